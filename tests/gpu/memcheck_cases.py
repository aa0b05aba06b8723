"""One small case of each kernel, for compute-sanitizer: `python memcheck_cases.py CASE`; test_memcheck.py runs it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from tests.kernels.cases import ragged_batch

NUM_BLOCKS, HEADS, BLOCK, HEAD_DIM = 5, 4, 16, 128
CACHE = (NUM_BLOCKS, HEADS, BLOCK, HEAD_DIM)


def attention(q_lens: list[int], kv_lens: list[int], *, decode_only: bool) -> jax.Array:
    batch = ragged_batch(
        0, q_lens, kv_lens, num_q_heads=8, num_kv_heads=HEADS, head_dim=HEAD_DIM, block_size=BLOCK, dtype=jnp.bfloat16
    )
    plan = pallas_kernels.plan_attention(
        *batch.metadata,
        num_tokens=len(batch.q),
        num_q_heads=8,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        block_size=BLOCK,
        dtype=jnp.bfloat16,
        decode_only=decode_only,
        implementation="mosaic_gpu",
    )
    return pallas_kernels.ragged_paged_attention(batch.q, batch.k_cache, batch.v_cache, plan, scale=0.1)


def write_kv(slots: list[int]) -> tuple[jax.Array, ...]:
    caches = [jnp.zeros(CACHE, jnp.bfloat16) for _ in range(2)]
    new = jnp.ones((len(slots), HEADS, HEAD_DIM), jnp.bfloat16)
    return pallas_kernels.write_kv(*caches, new, new, np.array(slots, np.int32), implementation="mosaic_gpu")


def rope_write_kv() -> tuple[jax.Array, ...]:
    caches = [jnp.zeros(CACHE, jnp.bfloat16) for _ in range(2)]
    qkv = jnp.ones((3, HEADS, 4, HEAD_DIM), jnp.bfloat16)
    angles = jnp.ones((3, HEAD_DIM // 2), jnp.float32)
    slots = np.array([0, -1, NUM_BLOCKS * BLOCK - 1], np.int32)
    return pallas_kernels.rope_write_kv(qkv, angles, angles, *caches, slots, implementation="mosaic_gpu")


def add_rms_norm() -> tuple[jax.Array, ...]:
    x, weight = jnp.ones((3, 896), jnp.bfloat16), jnp.ones(896, jnp.bfloat16)
    return pallas_kernels.add_rms_norm(x, x, weight, eps=1e-5, implementation="mosaic_gpu")


def truncate() -> jax.Array:
    logits = jax.random.normal(jax.random.key(0), (3, 1283))
    options = jnp.array([0, 5, 50], jnp.int32), jnp.array([0.9, 1.0, 0.9], jnp.float32), jnp.zeros(3, jnp.float32)
    return pallas_kernels.truncate_logits(logits, *options, implementation="mosaic_gpu")


CASES = {
    # A slot behind the last block: what the checker must find.
    "overrun": lambda: write_kv([NUM_BLOCKS * BLOCK + 3]),
    "decode": lambda: attention([1, 1, 1], [100, 1, 33], decode_only=True),
    "mixed": lambda: attention([1, 40, 5], [100, 40, 69], decode_only=False),
    "write_kv": lambda: write_kv([0, -1, NUM_BLOCKS * BLOCK - 1]),
    "rope_write_kv": rope_write_kv,
    "add_rms_norm": add_rms_norm,
    "truncate": truncate,
}

if __name__ == "__main__":
    for name in sys.argv[1:]:
        jax.block_until_ready(CASES[name]())
        print("ran", name, flush=True)
