"""One small case of each kernel, for compute-sanitizer: `python memcheck_cases.py CASE`; test_memcheck.py runs it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from tests.kernels.cases import RaggedBatch, batch_of_heads, step_plan

NUM_BLOCKS, HEADS, BLOCK, HEAD_DIM = 5, 4, 16, 128
CACHE = (NUM_BLOCKS, HEADS, BLOCK, HEAD_DIM)
FP8 = "float8_e4m3fn"


def make_batch(q_lens: list[int], kv_lens: list[int], cache_dtype: str | None = None) -> RaggedBatch:
    return batch_of_heads(0, q_lens, kv_lens, (8, HEADS, HEAD_DIM), BLOCK, cache_dtype=cache_dtype)


def attention(batch: RaggedBatch, *, decode_only: bool) -> jax.Array:
    plan = step_plan(batch, "mosaic_gpu", decode_only=decode_only)
    return pallas_kernels.ragged_paged_attention(batch.q, batch.k_cache, batch.v_cache, plan, scale=0.1)


def decode(cache_dtype: str | None = None) -> jax.Array:
    return attention(make_batch([1, 1, 1], [100, 1, 33], cache_dtype), decode_only=True)


def mixed(cache_dtype: str | None = None) -> jax.Array:
    return attention(make_batch([1, 40, 5], [100, 40, 69], cache_dtype), decode_only=False)


def write_kv(slots: list[int]) -> tuple[jax.Array, ...]:
    k_cache, v_cache = (jnp.zeros(CACHE, jnp.bfloat16) for _ in range(2))
    new = jnp.ones((len(slots), HEADS, HEAD_DIM), jnp.bfloat16)
    where = jnp.array(slots, jnp.int32)
    return pallas_kernels.write_kv(k_cache, v_cache, new, new, where, implementation="mosaic_gpu")


def rope_write_kv() -> tuple[jax.Array, ...]:
    k_cache, v_cache = (jnp.zeros(CACHE, jnp.bfloat16) for _ in range(2))
    qkv = jnp.ones((3, HEADS, 4, HEAD_DIM), jnp.bfloat16)
    angles = jnp.ones((3, HEAD_DIM // 2), jnp.float32)
    slots = jnp.array([0, -1, NUM_BLOCKS * BLOCK - 1], jnp.int32)
    return pallas_kernels.rope_write_kv(qkv, angles, angles, k_cache, v_cache, slots, implementation="mosaic_gpu")


def add_rms_norm() -> tuple[jax.Array, ...]:
    x, weight = jnp.ones((3, 896), jnp.bfloat16), jnp.ones(896, jnp.bfloat16)
    return pallas_kernels.add_rms_norm(x, x, weight, eps=1e-5, implementation="mosaic_gpu")


def products() -> jax.Array:
    """More tiles than a CTA computes at a time, the last one half empty, and clusters."""
    from pallas_kernels.matmul import mosaic_gpu

    x, w = jnp.ones((2240, 128), jnp.bfloat16), jnp.ones((128, 2, 1152), jnp.bfloat16)
    gated = mosaic_gpu.gated_matmul(x, w, mosaic_gpu.Config(128, 4, 2), interpret=False)
    return gated + mosaic_gpu.matmul(x, w[:, 0], mosaic_gpu.Config(192, 4), interpret=False)


def truncate(rows: int, vocab: int) -> jax.Array:
    logits = jax.random.normal(jax.random.key(0), (rows, vocab))
    options = jnp.array([0, 5, 50], jnp.int32), jnp.array([0.9, 1.0, 0.9], jnp.float32), jnp.zeros(3, jnp.float32)
    top_k, top_p, min_p = (option[jnp.arange(rows) % 3] for option in options)
    return pallas_kernels.truncate_logits(logits, top_k, top_p, min_p, implementation="mosaic_gpu")


def overrun_write() -> tuple[jax.Array, ...]:
    """A slot behind the last block."""
    return write_kv([NUM_BLOCKS * BLOCK + 3])


def overrun_read() -> jax.Array:
    """A row behind the last one of the block tables. What TMA reads would be cut off at the end of the array."""
    batch = make_batch([1], [100])
    behind = np.full_like(batch.table_rows, len(batch.block_tables))
    return attention(dataclasses.replace(batch, table_rows=behind), decode_only=True)


# What the checker must report.
PLANTED = {"overrun_write": overrun_write, "overrun_read": overrun_read}
CASES = {
    "decode": decode,
    "decode_fp8": lambda: decode(FP8),
    "mixed": mixed,
    "mixed_fp8": lambda: mixed(FP8),
    "write_kv": lambda: write_kv([0, -1, NUM_BLOCKS * BLOCK - 1]),
    "rope_write_kv": rope_write_kv,
    "add_rms_norm": add_rms_norm,
    "products": products,
    # Rows of one warpgroup, a row for each SM, two rows for one.
    "truncate": lambda: truncate(3, 1283),
    "truncate_wide": lambda: truncate(3, 16411),
    "truncate_many": lambda: truncate(133, 16411),
}

if __name__ == "__main__":
    for name in sys.argv[1:]:
        jax.block_until_ready({**PLANTED, **CASES}[name]())
        print("ran", name, flush=True)
