"""Cases of ragged_paged_attention, and the dense attention that it is compared with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels.bench.cases import Checked, Op, Timed, Tuned, normal, relative_error
from pallas_kernels.ragged_paged_attention import hopper, reference
from pallas_kernels.ragged_paged_attention.plan_decode import DecodeConfig, DecodeShape, plan_decode, tiling

_L2_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch of equal sequences: `q_len` new tokens at the end of `context` keys each."""

    batch: int
    q_len: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    kv_dtype: str = "bfloat16"
    shared: int = 0
    """Keys that all sequences share, whole blocks."""

    def __str__(self) -> str:
        context = f"context {self.context}" + (f", {self.shared} of it shared" if self.shared else "")
        text = (
            f"{self.batch} x {self.q_len} tokens, {context}, "
            f"{self.heads}/{self.kv_heads}x{self.head_dim}, block {self.block_size}"
        )
        return text if self.kv_dtype == "bfloat16" else f"{text}, {self.kv_dtype}"

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of the sequences, shared ones once."""
        keys = self.batch * (self.context - self.shared) + self.shared
        return 2 * keys * self.kv_heads * self.head_dim * jnp.dtype(self.kv_dtype).itemsize

    @property
    def flops(self) -> float:
        """Of the causal pairs: 4 * head_dim for each of them and each query head."""
        pairs = self.batch * (self.q_len * self.context - self.q_len * (self.q_len - 1) / 2)
        return 4 * pairs * self.heads * self.head_dim


DECODE = (
    Shape(1, 1, 8192),
    Shape(1, 1, 32768),
    Shape(8, 1, 8192),
    Shape(64, 1, 2048),
    Shape(256, 1, 1024),
    Shape(256, 1, 4096),
    Shape(64, 1, 2048, block_size=64),
    Shape(64, 1, 2048, kv_heads=32),
    Shape(64, 1, 2048, head_dim=64),
    Shape(64, 5, 2048),
    Shape(64, 1, 4160, shared=4096),
    Shape(256, 1, 2304, shared=2048),
    Shape(256, 1, 4096, kv_dtype="float8_e4m3fn"),
    Shape(64, 1, 2048, kv_dtype="float8_e4m3fn"),
)
PREFILL = (
    Shape(1, 8192, 8192),
    Shape(4, 2048, 2048),
    Shape(16, 512, 512),
    Shape(1, 2048, 18432),
    Shape(1, 8192, 8192, block_size=64),
    Shape(1, 8192, 8192, head_dim=64),
    Shape(1, 8192, 8192, heads=16, head_dim=256),
    Shape(1, 8192, 8192, kv_dtype="float8_e4m3fn"),
)


def plan(implementation: str | None, shape: Shape, num_tokens: int, *metadata: jax.Array, decode_only: bool) -> Any:
    """The plan of num_tokens tokens with the heads and blocks of `shape`."""
    return pallas_kernels.plan_attention(
        *metadata,
        num_tokens=num_tokens,
        num_q_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        block_size=shape.block_size,
        dtype=shape.kv_dtype,
        decode_only=decode_only,
        max_decode_tokens=shape.q_len if decode_only else 1,
        implementation=implementation,
    )


def attend(q: jax.Array, k_cache: jax.Array, v_cache: jax.Array, plan: Any) -> jax.Array:
    return pallas_kernels.ragged_paged_attention(q, k_cache, v_cache, plan, scale=q.shape[2] ** -0.5)


def paged_arguments(shape: Shape, seed: int) -> tuple:
    """Queries, caches whose blocks the sequences hold in random order, and the metadata of a plan."""
    blocks = -(-shape.context // shape.block_size)
    ids = np.random.default_rng(seed).permutation(shape.batch * blocks) + 1
    tables = np.concatenate([np.zeros((1, blocks), np.int64), ids.reshape(shape.batch, blocks)]).astype(np.int32)
    tables[1:, : shape.shared // shape.block_size] = tables[1, : shape.shared // shape.block_size]
    cache = (shape.batch * blocks + 1, shape.kv_heads, shape.block_size, shape.head_dim)
    q = normal((shape.batch * shape.q_len, shape.heads, shape.head_dim), seed=seed)
    metadata = (
        tables,
        np.arange(1, shape.batch + 1, dtype=np.int32),
        np.arange(shape.batch + 1, dtype=np.int32) * np.int32(shape.q_len),
        np.full(shape.batch, shape.context, np.int32),
    )
    caches = [normal(cache, shape.kv_dtype, seed + i) for i in (1, 2)]
    return q, *caches, *map(jnp.asarray, metadata)


def planned_arguments(shape: Shape, decode: bool, seed: int) -> tuple:
    """Arguments of `attend`: the plan, which a step makes once for all its layers, is not timed with it."""
    q, k_cache, v_cache, *metadata = paged_arguments(shape, seed)
    return q, k_cache, v_cache, jax.jit(_planner(shape, decode))(*metadata)


def _planner(shape: Shape, decode: bool) -> Callable:
    return functools.partial(plan, None, shape, shape.batch * shape.q_len, decode_only=decode)


def dense_cudnn(shape: Shape) -> Callable | None:
    """Of the same arguments: cuDNN's attention over contiguous keys, those of the cache in the order they lie in.

    None where cuDNN has no such mask (causal with fewer queries than keys, but for one query), or cannot share keys.
    """
    if shape.q_len not in (1, shape.context) or shape.kv_dtype != "bfloat16" or shape.shared:
        return None

    def attend(q: jax.Array, k_cache: jax.Array, v_cache: jax.Array, *_: jax.Array) -> jax.Array:
        k, v = (
            cache[1:].reshape(shape.batch, -1, shape.kv_heads, shape.head_dim)[:, : shape.context]
            for cache in (k_cache, v_cache)
        )
        q = q.reshape(shape.batch, shape.q_len, shape.heads, shape.head_dim)
        is_causal = shape.q_len > 1
        return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, implementation="cudnn")

    return attend


def _timed(shapes: Sequence[Shape], *, decode: bool) -> list[Timed]:
    cases = []
    for shape in shapes:
        columns = {"default": attend}
        cudnn = dense_cudnn(shape)
        if cudnn is not None:
            columns["cudnn, dense"] = cudnn
        cases.append(_timed_case(shape, columns, functools.partial(planned_arguments, shape, decode), decode=decode))
    plans = [
        Timed(f"plan of {shape}", {"default": _planner(shape, decode)}, functools.partial(_metadata, shape), 1 << 30)
        for shape in shapes[:2]
    ]
    return cases + plans


def _metadata(shape: Shape, seed: int) -> tuple:
    return paged_arguments(shape, seed)[3:]


def _timed_case(
    shape: Shape, columns: dict[str, Callable], arguments: Callable[[int], tuple], *, decode: bool
) -> Timed:
    return Timed(
        str(shape),
        columns,
        arguments,
        read_bytes=shape.cache_bytes,
        bytes_moved=shape.cache_bytes if decode else None,
        flops=None if decode else shape.flops,
        ceiling="read" if decode else "matmul",
    )


CANDIDATES = (
    DecodeConfig(heads=8, stages=6),
    DecodeConfig(heads=8, stages=2, streams=2),
    DecodeConfig(heads=8, stages=2, streams=2, unroll=2),
    DecodeConfig(heads=8, stages=3, streams=3),
    DecodeConfig(heads=4, stages=6),
    DecodeConfig(heads=4, stages=6, unroll=2),
    DecodeConfig(heads=4, columns=64, stages=5, streams=2),
    DecodeConfig(heads=2, stages=6),
    DecodeConfig(heads=2, stages=2, streams=2),
    DecodeConfig(heads=2, stages=4, staged=128, unroll=2),
    DecodeConfig(heads=2, stages=4, staged=128, unroll=2, ctas=128),
    DecodeConfig(heads=2, stages=5, staged=128, unroll=8),
    DecodeConfig(heads=2, stages=5, staged=128, unroll=8, min_tiles=1),
    DecodeConfig(heads=2, stages=5, staged=128, unroll=32),
)
_SHORT_CONTEXT = 1024


def _tuned() -> list[Tuned]:
    cases = {}
    bf16 = [shape for shape in DECODE if shape.kv_dtype == "bfloat16" and not shape.shared]
    for shape in bf16:  # of cases that differ in the context alone the last one, with the longest
        static = DecodeShape(
            shape.batch * shape.q_len,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            shape.block_size,
            shape.q_len,
            finds_prefixes=shape.q_len == 1 and hopper.looks_for_prefixes(shape.head_dim, shape.batch, shape.kv_dtype),
        )
        exact, sizes = hopper.decode_case(static, shape.batch, shape.kv_dtype)
        fitting = [config for config in CANDIDATES if _fits(config, static)]
        candidates = [hopper.default_decode_config(static, shape.batch, shape.kv_dtype), *fitting]
        timed = functools.partial(_timed_config, shape, static)
        cases[str((exact, sizes))] = Tuned(hopper.DECODE_KERNEL, exact, sizes, candidates, timed)
    return list(cases.values())


def _fits(config: DecodeConfig, shape: DecodeShape) -> bool:
    if shape.max_q_len > 1 and config.streams > 1:  # spills registers
        return False
    try:
        tiling(config, shape)
    except ValueError:
        return False
    return True


def _timed_config(shape: Shape, static: DecodeShape, config: DecodeConfig) -> list[Timed]:
    """With the shape's context and with a short one, which favours configs that cut little."""

    def attend(q: jax.Array, k_cache: jax.Array, v_cache: jax.Array, *metadata: jax.Array) -> jax.Array:
        from pallas_kernels.ragged_paged_attention.mosaic_decode import decode_attention

        block_tables, table_rows, cu_q_lens, kv_lens = metadata
        plan = plan_decode(block_tables, table_rows, cu_q_lens, kv_lens, static, config)
        return decode_attention(q, k_cache, v_cache, plan, scale=shape.head_dim**-0.5)

    shapes = [shape, dataclasses.replace(shape, context=_SHORT_CONTEXT)]
    cases = [_timed_case(s, {"config": attend}, functools.partial(paged_arguments, s), decode=True) for s in shapes]
    # The plan is a step's, not a layer's.
    return [dataclasses.replace(case, kernels=("decode_attention",)) for case in cases]


def _ragged_error(shape: Shape, seed: int, decode_only: bool, implementation: str) -> float:
    """Random lengths up to the context, shared tables, padding sequences and NaN in blocks that no one owns."""
    rng = np.random.default_rng(seed)
    q_lens = np.ones(shape.batch, np.int64) if decode_only else rng.integers(1, shape.q_len + 1, shape.batch)
    kv_lens = q_lens + rng.integers(0, shape.context - q_lens.max() + 1, shape.batch)
    kv_lens[0] = q_lens[0]
    q, k_cache, v_cache, tables, *_ = paged_arguments(shape, seed)
    q = q[: q_lens.sum() + (0 if decode_only else 3)]
    rows = np.arange(1, shape.batch + 1)
    position = np.arange(shape.context)
    written = np.zeros((k_cache.shape[0], shape.block_size), bool)
    host_tables = np.asarray(tables)
    for row, length in zip(rows, kv_lens, strict=True):
        used = position[:length]
        written[host_tables[row][used // shape.block_size], used % shape.block_size] = True
    k_cache, v_cache = (jnp.where(written[:, None, :, None], cache, jnp.nan) for cache in (k_cache, v_cache))
    starts = np.concatenate([[0], np.cumsum(q_lens)])
    metadata = [tables, *(jnp.asarray(x, jnp.int32) for x in (rows, starts, kv_lens))]
    make = functools.partial(plan, implementation, shape, q.shape[0], decode_only=decode_only)
    got = jax.jit(attend)(q, k_cache, v_cache, jax.jit(make)(*metadata))
    wanted = jax.jit(functools.partial(reference.ragged_paged_attention, scale=shape.head_dim**-0.5))(
        q, k_cache, v_cache, *metadata
    )
    return relative_error(got, wanted)


def _checked(decode_only: bool) -> list[Checked]:
    heads = ((32, 8, 128), (32, 32, 128), (8, 1, 128), (32, 8, 64), (16, 8, 256))
    return [
        Checked(
            f"{shape}, ragged",
            functools.partial(_ragged_error, shape, 3, decode_only),
            1e-2,
        )
        for heads_of in heads
        for block_size in (16, 64)
        for shape in [Shape(7, 1 if decode_only else 200, 1000, *heads_of, block_size)]
    ]


def _no_tuning() -> Sequence[Tuned]:
    return []


DECODE_ATTENTION = Op("decode", lambda: _timed(DECODE, decode=True), _tuned, lambda: _checked(True))
PREFILL_ATTENTION = Op("prefill", lambda: _timed(PREFILL, decode=False), _no_tuning, lambda: _checked(False))


def torch_seconds(case: Timed) -> float | None:
    """Time of torch's scaled_dot_product_attention on the shape of an attention case; None where it does not apply."""
    shape = next((s for s in (*DECODE, *PREFILL) if str(s) == case.name), None)
    if shape is None or dense_cudnn(shape) is None:
        return None
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return _torch_seconds(torch, shape) if torch.cuda.is_available() else None


def _torch_seconds(torch: Any, shape: Shape) -> float:
    sets = max(1, -(-4 * _L2_BYTES // shape.cache_bytes))
    made = []
    for _ in range(min(8, sets)):
        sizes = ((shape.heads, shape.q_len), (shape.kv_heads, shape.context), (shape.kv_heads, shape.context))
        made.append(
            [torch.randn(shape.batch, *size, shape.head_dim, device="cuda", dtype=torch.bfloat16) for size in sizes]
        )
    times = []
    for i in range(12):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.nn.functional.scaled_dot_product_attention(
            *made[i % len(made)], is_causal=shape.q_len > 1, enable_gqa=shape.heads != shape.kv_heads
        )
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times[2:])[5]
