"""Inputs and implementations that the kernel tests share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike

import pallas_kernels
from pallas_kernels.implementation import MOSAIC_GPU, MOSAIC_GPU_INTERPRET, XLA, mosaic_unavailable_reason
from pallas_kernels.ragged_paged_attention.plan_decode import DecodeConfig, DecodePlan, DecodeShape, plan_decode

needs_mosaic = pytest.mark.skipif(mosaic_unavailable_reason() is not None, reason=str(mosaic_unavailable_reason()))
on_gpu = [pytest.mark.gpu, needs_mosaic]

IMPLEMENTATIONS = [
    pytest.param(XLA, id="xla"),
    pytest.param(MOSAIC_GPU_INTERPRET, id="interpreter", marks=needs_mosaic),
    pytest.param(MOSAIC_GPU, id="mosaic_gpu", marks=on_gpu),
]
INTERPRET = [pytest.param(True, id="interpreter", marks=needs_mosaic), pytest.param(False, id="gpu", marks=on_gpu)]

# Relative error (Frobenius) that rounding of the weights and the output to the dtype explains.
TOLERANCE = {"float32": 2e-6, "float16": 1.5e-3, "bfloat16": 6e-3}


def assert_no_races() -> None:
    """After an interpreted kernel: its memory accesses were all ordered."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    races = interpret_pallas_call.get_races()
    assert races is None or not races.races_found


def assert_tokens_close(got: np.ndarray, wanted: np.ndarray, dtype: str = "bfloat16") -> None:
    """[T, H, D] arrays agree in every token, as far as `dtype` allows."""
    assert np.isfinite(got).all()
    for token in range(len(got)):
        error = np.linalg.norm(got[token] - wanted[token]) / max(np.linalg.norm(wanted[token]), 1e-30)
        assert error < TOLERANCE[dtype], f"token {token}: relative error {error}"


@dataclasses.dataclass(frozen=True)
class RaggedBatch:
    """A step's attention inputs: queries, caches (NaN in slots that no sequence owns) and who owns what."""

    q: jax.Array
    k_cache: jax.Array
    v_cache: jax.Array
    block_tables: np.ndarray
    table_rows: np.ndarray
    cu_q_lens: np.ndarray
    kv_lens: np.ndarray

    @property
    def metadata(self) -> tuple[np.ndarray, ...]:
        return self.block_tables, self.table_rows, self.cu_q_lens, self.kv_lens

    @property
    def num_real_tokens(self) -> int:
        return int(self.cu_q_lens[-1])


def ragged_batch(
    seed: int,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: DTypeLike,
    cache_dtype: DTypeLike | None = None,
    padding_seqs: int = 0,
    padding_tokens: int = 0,
    shared_blocks: int = 0,
    poison: bool = True,
) -> RaggedBatch:
    """Sequences whose blocks lie in random order; those that have them share their first `shared_blocks` blocks."""
    rng = np.random.default_rng(seed)
    num_blocks_of = [-(-length // block_size) for length in kv_lens]
    num_seqs, width = len(q_lens), max(num_blocks_of) + 1
    num_blocks = sum(num_blocks_of) + 3
    free = list(rng.permutation(np.arange(1, num_blocks)))
    shared = [free.pop() for _ in range(min(shared_blocks, max(num_blocks_of)))]
    block_tables = np.zeros((num_seqs + 2, width), np.int32)
    table_rows = np.zeros(num_seqs + padding_seqs, np.int32)
    table_rows[:num_seqs] = rng.permutation(num_seqs) + 1
    written = np.zeros((num_blocks, block_size), bool)
    for row, length, count in zip(table_rows, kv_lens, num_blocks_of, strict=False):
        ids = shared[:count] + [free.pop() for _ in range(count - len(shared[:count]))]
        block_tables[row, :count] = ids
        position = np.arange(int(length))
        written[np.asarray(ids, np.int32)[position // block_size], position % block_size] = True

    def cache() -> jax.Array:
        values = rng.standard_normal((num_blocks, num_kv_heads, block_size, head_dim), np.float32)
        if poison:
            values = np.where(written[:, None, :, None], values, np.nan)
        return jnp.asarray(values, dtype if cache_dtype is None else cache_dtype)

    lens = np.concatenate([q_lens, np.zeros(padding_seqs, np.int64)])
    num_tokens = int(lens.sum()) + padding_tokens
    return RaggedBatch(
        q=jnp.asarray(rng.standard_normal((num_tokens, num_q_heads, head_dim), np.float32), dtype),
        k_cache=cache(),
        v_cache=cache(),
        block_tables=block_tables,
        table_rows=table_rows,
        cu_q_lens=np.concatenate([[0], np.cumsum(lens)]).astype(np.int32),
        kv_lens=np.concatenate([kv_lens, np.zeros(padding_seqs)]).astype(np.int32),
    )


def batch_of_heads(
    seed: int, q_lens: Sequence[int], kv_lens: Sequence[int], heads: Sequence[int], block_size: int, **options: Any
) -> RaggedBatch:
    """ragged_batch of (query heads, KV heads, head dim), in bfloat16 unless `options` say otherwise."""
    num_q_heads, num_kv_heads, head_dim = heads
    options = {
        "num_q_heads": num_q_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "block_size": block_size,
        "dtype": "bfloat16",
        **options,
    }
    return ragged_batch(seed, q_lens, kv_lens, **options)


def step_plan(batch: RaggedBatch, implementation: str, **options: Any) -> pallas_kernels.AttentionPlan:
    """plan_attention's plan of the batch, compiled as in a step: eagerly, it is a hundred small programs."""
    num_tokens, num_q_heads, head_dim = batch.q.shape
    make = functools.partial(
        pallas_kernels.plan_attention,
        num_tokens=num_tokens,
        num_q_heads=num_q_heads,
        num_kv_heads=batch.k_cache.shape[1],
        head_dim=head_dim,
        block_size=batch.k_cache.shape[2],
        dtype=batch.k_cache.dtype,
        implementation=implementation,
        **options,
    )
    return jax.jit(make)(*batch.metadata)


def decode_plan(
    batch: RaggedBatch,
    *,
    max_q_len: int = 1,
    sliding_window: int | None = None,
    finds_prefixes: bool = False,
    **config: int,
) -> DecodePlan:
    """The decode kernel's plan of the batch with a DecodeConfig of these fields."""
    num_tokens, num_q_heads, head_dim = batch.q.shape
    shape = DecodeShape(
        num_tokens=num_tokens,
        num_q_heads=num_q_heads,
        num_kv_heads=batch.k_cache.shape[1],
        head_dim=head_dim,
        block_size=batch.k_cache.shape[2],
        max_q_len=max_q_len,
        sliding_window=sliding_window,
        finds_prefixes=finds_prefixes,
    )
    make = functools.partial(plan_decode, shape=shape, config=DecodeConfig(**config))
    return jax.jit(make)(*map(jnp.asarray, batch.metadata))
