"""Ragged paged attention: every implementation against the dense float32 definition."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.implementation import MOSAIC_GPU, MOSAIC_GPU_INTERPRET, is_mosaic
from pallas_kernels.ragged_paged_attention import reference
from pallas_kernels.ragged_paged_attention.shapes import MODELS
from tests.kernels.cases import (
    IMPLEMENTATIONS,
    RaggedBatch,
    assert_no_races,
    assert_tokens_close,
    batch_of_heads,
    on_gpu,
    ragged_batch,
    step_plan,
)


def run(
    batch: RaggedBatch, implementation: str, *, decode_only: bool = False, max_decode_tokens: int = 1, **options
) -> np.ndarray:
    plan = step_plan(
        batch,
        implementation,
        decode_only=decode_only,
        max_decode_tokens=max_decode_tokens,
        sliding_windows=(options.get("sliding_window"),),
    )
    options = {"scale": batch.q.shape[-1] ** -0.5, **options}
    output = pallas_kernels.ragged_paged_attention(batch.q, batch.k_cache, batch.v_cache, plan, **options)
    assert output.dtype == batch.q.dtype
    output = np.asarray(output.astype(jnp.float32))
    if implementation == MOSAIC_GPU_INTERPRET:
        assert_no_races()
    return output


def check(
    batch: RaggedBatch, implementation: str, *, decode_only: bool = False, max_decode_tokens: int = 1, **options
) -> None:
    got = run(batch, implementation, decode_only=decode_only, max_decode_tokens=max_decode_tokens, **options)
    options = {"scale": batch.q.shape[-1] ** -0.5, **options}
    wanted = np.asarray(
        reference.ragged_paged_attention(batch.q, batch.k_cache, batch.v_cache, *batch.metadata, **options)
    )
    real = batch.num_real_tokens
    assert not got[real:].any()
    assert_tokens_close(got[:real], wanted[:real], batch.q.dtype.name)


def dtype_for(implementation: str) -> str:
    return "bfloat16" if is_mosaic(implementation) else "float32"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("block_size", "num_q_heads", "num_kv_heads", "head_dim"),
    [(16, 8, 2, 64), (64, 6, 2, 128), (32, 2, 1, 256)],
)
def test_mixed_batch(implementation: str, block_size: int, num_q_heads: int, num_kv_heads: int, head_dim: int):
    batch = ragged_batch(
        1,
        [1, 1, 75, 5],
        [131, 1, 75, 69],
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype_for(implementation),
        padding_seqs=2,
        padding_tokens=7,
    )
    check(batch, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("block_size", "num_q_heads", "num_kv_heads", "head_dim", "padding_seqs"),
    [(16, 8, 2, 64, 2), (64, 7, 1, 128, 0), (128, 2, 2, 128, 0), (32, 2, 1, 256, 1)],
)
def test_decode_batch(
    implementation: str, block_size: int, num_q_heads: int, num_kv_heads: int, head_dim: int, padding_seqs: int
):
    batch = ragged_batch(
        2,
        [1, 1, 1],
        [200, 1, 64],
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype_for(implementation),
        padding_seqs=padding_seqs,
        padding_tokens=padding_seqs,
    )
    check(batch, implementation, decode_only=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("decode_only", [False, True])
@pytest.mark.parametrize("options", [{"sliding_window": 1}, {"sliding_window": 70}, {"soft_cap": 2.0, "scale": 0.5}])
def test_options(implementation: str, decode_only: bool, options: dict):
    batch = ragged_batch(
        3,
        [1, 1] if decode_only else [1, 40],
        [150, 40],
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=64,
        block_size=16,
        dtype=dtype_for(implementation),
    )
    check(batch, implementation, decode_only=decode_only, **options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("decode_only", [False, True])
def test_few_tokens_and_sinks(implementation: str, decode_only: bool):
    """Speculative verification: sequences of up to three tokens are decodes, wherever they stand in the step."""
    batch = ragged_batch(
        11,
        [2, 3, 1] if decode_only else [2, 30, 3],
        [40, 130, 1] if decode_only else [40, 30, 130],
        num_q_heads=6,
        num_kv_heads=2,
        head_dim=64,
        block_size=16,
        dtype=dtype_for(implementation),
        padding_seqs=1,
        padding_tokens=3,
    )
    sinks = jnp.linspace(-2.0, 6.0, 6, dtype=jnp.float32)
    check(batch, implementation, decode_only=decode_only, max_decode_tokens=3, sinks=sinks, sliding_window=100)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shared_prefix(implementation: str):
    """The first eight sequences share 272 keys; the other seven are too short to."""
    kv_lens = [300, 273, 280, 290, 320, 400, 288, 289, 30, 270, 1, 16, 17, 2, 3]
    options = {"dtype": dtype_for(implementation), "padding_seqs": 1, "padding_tokens": 1, "shared_blocks": 17}
    batch = batch_of_heads(12, [1] * 15, kv_lens, (8, 2, 64), 16, **options)
    sinks = jnp.linspace(-2.0, 6.0, 8, dtype=jnp.float32)
    check(batch, implementation, decode_only=True, sinks=sinks, soft_cap=20.0)


@pytest.mark.parametrize("implementation", [IMPLEMENTATIONS[0], IMPLEMENTATIONS[2]])
@pytest.mark.parametrize("seed", range(6))
def test_random_batches(implementation: str, seed: int):
    rng = np.random.default_rng(seed)
    block_size = int(rng.choice([16, 32, 64, 128]))
    group, num_kv_heads = int(rng.choice([1, 3, 4, 7, 8])), int(rng.choice([1, 2, 4]))
    edges = [1, 2, block_size - 1, block_size, block_size + 1, 127, 128, 129, 300]
    q_lens = rng.choice([1, 1, 1, 2, 5, 64, 129], int(rng.integers(1, 9)))
    kv_lens = q_lens + rng.choice([0, *edges], q_lens.shape)
    batch = ragged_batch(
        seed,
        q_lens.tolist(),
        kv_lens.tolist(),
        num_q_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=int(rng.choice([64, 128, 256])),
        block_size=block_size,
        dtype="float16",
        padding_seqs=int(rng.integers(0, 3)),
        padding_tokens=int(rng.integers(0, 20)),
        shared_blocks=int(rng.integers(0, 3)),
    )
    options: dict[str, Any] = {"sliding_window": int(rng.integers(1, 200))} if seed % 2 else {}
    sinks = jnp.asarray(rng.normal(size=group * num_kv_heads), jnp.float32) if seed % 3 else None
    check(batch, implementation, max_decode_tokens=int(rng.integers(1, 6)), sinks=sinks, **options)


@pytest.mark.parametrize("implementation", [IMPLEMENTATIONS[0], IMPLEMENTATIONS[2]])
@pytest.mark.parametrize("decode_only", [False, True])
def test_long_context(implementation: str, decode_only: bool):
    batch = ragged_batch(
        12,
        [1] if decode_only else [3],
        [131072],
        num_q_heads=4,
        num_kv_heads=1,
        head_dim=64,
        block_size=128,
        dtype="bfloat16",
    )
    check(batch, implementation, decode_only=decode_only)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shared_prefix_blocks(implementation: str):
    batch = ragged_batch(
        4,
        [1, 20, 3],
        [100, 90, 70],
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=64,
        block_size=16,
        dtype=dtype_for(implementation),
        shared_blocks=3,
    )
    check(batch, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_real_token(implementation: str):
    batch = ragged_batch(
        5, [1], [5], num_q_heads=2, num_kv_heads=1, head_dim=64, block_size=16, dtype=dtype_for(implementation)
    )
    empty = dataclasses.replace(
        batch,
        table_rows=np.zeros_like(batch.table_rows),
        cu_q_lens=np.zeros_like(batch.cu_q_lens),
        kv_lens=np.zeros_like(batch.kv_lens),
    )
    for decode_only in (False, True):
        assert not run(empty, implementation, decode_only=decode_only).any()


def test_float16_and_odd_head_dims():
    for dtype, head_dim in (("float16", 80), ("float32", 96), ("bfloat16", 20)):
        batch = ragged_batch(
            6, [1, 30], [40, 30], num_q_heads=6, num_kv_heads=3, head_dim=head_dim, block_size=16, dtype=dtype
        )
        check(batch, "xla")


def exact_batch(implementation_dtype: str) -> tuple[RaggedBatch, np.ndarray]:
    """Scores that are small integers (base 2) and integer values: weights are powers of two, sums are exact."""
    head_dim, keys = 128, 300
    batch = ragged_batch(
        7,
        [keys],
        [keys],
        num_q_heads=4,
        num_kv_heads=1,
        head_dim=head_dim,
        block_size=16,
        dtype=implementation_dtype,
        padding_tokens=4,
    )
    rng = np.random.default_rng(7)
    exponent = rng.integers(0, 7, (4, keys))
    values = rng.integers(-8, 9, (keys, head_dim))
    k_cache, v_cache = np.zeros(batch.k_cache.shape, np.float32), np.zeros(batch.v_cache.shape, np.float32)
    blocks = batch.block_tables[batch.table_rows[0]]
    position = np.arange(keys)
    block, offset = blocks[position // 16], position % 16
    k_cache[block, 0, offset, :4] = -exponent.T
    v_cache[block, 0, offset] = values
    q = np.zeros(batch.q.shape, np.float32)
    q[:, np.arange(4), np.arange(4)] = 1.0
    weights = np.tril(np.ones((keys, keys)))[:, None, :] * 2.0 ** -exponent[None]
    wanted = np.einsum("thk,kd->thd", weights, values) / weights.sum(-1, keepdims=True)
    q, k_cache, v_cache = (jnp.asarray(x, implementation_dtype) for x in (q, k_cache, v_cache))
    return dataclasses.replace(batch, q=q, k_cache=k_cache, v_cache=v_cache), wanted


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_exact_weights_and_values(implementation: str):
    batch, wanted = exact_batch("bfloat16")
    got = run(batch, implementation, scale=math.log(2))[: wanted.shape[0]]
    np.testing.assert_allclose(got, wanted, rtol=2.0**-8, atol=1e-6)


GPU_MIXES = {
    "llama3_8b_mixed": (("llama3_8b", 16), [1] * 40 + [700, 33, 512], [1, 17, 64, 65, 4000] * 8 + [700, 5000, 8192]),
    "llama2_7b_mixed": (("llama2_7b", 64), [1] * 10 + [900, 65], [3000] * 10 + [900, 4096]),
    "qwen2_7b_mixed": (("qwen2_7b", 16), [1] * 6 + [300, 1000], [2000] * 6 + [300, 1500]),
    "head_64_mixed": (("llama3_1b", 32), [1] * 6 + [300, 1000], [2000] * 6 + [300, 1500]),
    "head_256_mixed": (("gemma2_9b", 16), [1] * 6 + [300, 500], [2000] * 6 + [300, 1500]),
    "llama3_8b_32k": (("llama3_8b", 16), [1, 256], [32768, 32768]),
}
GPU_DECODES = {
    "llama3_8b_b1_32k": (("llama3_8b", 16), [32768]),
    "llama3_8b_b1_short": (("llama3_8b", 16), [3]),
    "llama3_8b_b8": (("llama3_8b", 16), [8192, 1, 700, 64, 65, 8000, 4095, 129]),
    "llama3_8b_b64": (("llama3_8b", 64), list(range(1, 4097, 64))),
    "llama2_7b_b16": (("llama2_7b", 128), list(range(100, 3300, 200))),
    "head_64_b4": (("llama3_1b", 16), [5000, 1, 64, 777]),
    "head_256_b4": (("gemma2_9b", 16), [5000, 1, 64, 777]),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=on_gpu) for name in GPU_MIXES])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 1000, "soft_cap": 30.0}], ids=["plain", "window_cap"])
def test_real_sizes_mixed(name: str, options: dict):
    (model, block_size), q_lens, kv_lens = GPU_MIXES[name]
    num_q_heads, num_kv_heads, head_dim = MODELS[model]
    batch = ragged_batch(
        8,
        q_lens,
        kv_lens,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype="bfloat16",
        padding_seqs=5,
        padding_tokens=31,
    )
    check(batch, MOSAIC_GPU, **options)


@pytest.mark.parametrize("name", [pytest.param(name, marks=on_gpu) for name in GPU_DECODES])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 1000, "soft_cap": 30.0}], ids=["plain", "window_cap"])
def test_real_sizes_decode(name: str, options: dict):
    (model, block_size), kv_lens = GPU_DECODES[name]
    num_q_heads, num_kv_heads, head_dim = MODELS[model]
    batch = ragged_batch(
        9,
        [1] * len(kv_lens),
        kv_lens,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype="bfloat16",
        padding_seqs=1,
        padding_tokens=1,
    )
    check(batch, MOSAIC_GPU, decode_only=True, **options)


@pytest.mark.parametrize("decode_only", [pytest.param(flag, marks=on_gpu) for flag in (False, True)])
def test_repeats_bitwise(decode_only: bool):
    q_lens = [1] * 8 if decode_only else [1, 1, 300, 1000]
    kv_lens = [8000, 30, 64, 1, 4000, 129, 777, 2048] if decode_only else [4000, 1, 300, 3000]
    batch = ragged_batch(
        10, q_lens, kv_lens, num_q_heads=32, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16"
    )
    first = run(batch, MOSAIC_GPU, decode_only=decode_only)
    for _ in range(20):
        np.testing.assert_array_equal(run(batch, MOSAIC_GPU, decode_only=decode_only), first)
