"""Times the kernels on a GPU at the shapes of real models: `python tests/kernels/gpu_check.py`.

Correctness on the GPU is `VJAX_TEST_PLATFORM=gpu pytest -m gpu tests/kernels`. Every figure is the mean of a chain of
calls inside one executable, each of which depends on the one before, so launches are counted and dispatch is not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels

CHAIN = 20
REPEATS = 5


def seconds_per_call(function: Callable, state, *arguments) -> float:
    """Best time of one of CHAIN dependent calls; `function(state, *arguments)` returns the next state."""

    def chain(state, *arguments):
        for _ in range(CHAIN):
            state = function(state, *arguments)
        return state

    compiled = jax.jit(chain, donate_argnums=0)
    state = jax.block_until_ready(compiled(state, *arguments))
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        state = jax.block_until_ready(compiled(state, *arguments))
        best = min(best, time.perf_counter() - start)
    return best / CHAIN


def attention(heads, kv_heads, head_dim, block_size, q_len, contexts) -> None:
    num_seqs = len(contexts)
    rng = np.random.default_rng(0)
    blocks = [-(-context // block_size) for context in contexts]
    ids = rng.permutation(sum(blocks)) + 1
    tables = np.zeros((num_seqs + 1, max(blocks)), np.int32)
    for row, (count, end) in enumerate(zip(blocks, np.cumsum(blocks), strict=True)):
        tables[row + 1, :count] = ids[end - count : end]
    key = jax.random.key(0)
    shape = (sum(blocks) + 1, kv_heads, block_size, head_dim)
    caches = [jax.random.normal(k, shape, jnp.bfloat16) for k in jax.random.split(key)]
    num_tokens = num_seqs * q_len
    plan = jax.jit(
        lambda *metadata: pallas_kernels.plan_attention(
            *metadata,
            num_tokens=num_tokens,
            num_q_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            dtype=jnp.bfloat16,
            decode_only=q_len == 1,
        )
    )(
        tables,
        np.arange(1, num_seqs + 1, dtype=np.int32),
        np.arange(num_seqs + 1, dtype=np.int32) * q_len,
        np.array(contexts, np.int32),
    )
    q = jax.random.normal(key, (num_tokens, heads, head_dim), jnp.bfloat16)

    def call(q, k_cache, v_cache, plan):
        return pallas_kernels.ragged_paged_attention(q, k_cache, v_cache, plan, scale=head_dim**-0.5)

    seconds = seconds_per_call(call, q, *caches, plan)
    cache_bytes = 4 * sum(contexts) * kv_heads * head_dim
    pairs = sum(q_len * context - q_len * (q_len - 1) / 2 for context in contexts)
    flops = 4 * pairs * heads * head_dim
    print(
        f"attention {heads}/{kv_heads}x{head_dim} block {block_size}, {num_seqs} x {q_len} tokens, "
        f"context {contexts[0]}: {seconds * 1e6:.1f} us, {cache_bytes / seconds / 1e12:.2f} TB/s of cache, "
        f"{flops / seconds / 1e12:.0f} TFLOP/s, {plan.implementation}",
        flush=True,
    )


def kv_write(kv_heads, head_dim, block_size, num_tokens) -> None:
    shape = (4000, kv_heads, block_size, head_dim)
    caches = (jnp.zeros(shape, jnp.bfloat16), jnp.zeros(shape, jnp.bfloat16))
    new = jnp.ones((num_tokens, kv_heads, head_dim), jnp.bfloat16)
    slots = np.random.default_rng(0).permutation(4000 * block_size)[:num_tokens].astype(np.int32)

    def call(caches, new, slots):
        return pallas_kernels.write_kv(caches[0], caches[1], new, new, slots)

    seconds = seconds_per_call(call, caches, new, slots)
    print(f"write_kv {kv_heads}x{head_dim} block {block_size} {num_tokens} tokens: {seconds * 1e6:.1f} us", flush=True)


def truncation(rows, vocab, top_k, top_p) -> None:
    logits = jax.random.normal(jax.random.key(0), (rows, vocab)) * 3
    options = (jnp.full(rows, top_k, jnp.int32), jnp.full(rows, top_p, jnp.float32), jnp.zeros(rows, jnp.float32))
    seconds = seconds_per_call(pallas_kernels.truncate_logits, logits, *options)
    print(f"truncate_logits [{rows}, {vocab}] top_k {top_k} top_p {top_p}: {seconds * 1e6:.1f} us", flush=True)


def main() -> None:
    print(jax.devices()[0].device_kind, jax.__version__, flush=True)
    for block_size in (16, 64):
        attention(32, 8, 128, block_size, 1, [8192])
        attention(32, 8, 128, block_size, 1, [32768])
        attention(32, 8, 128, block_size, 1, [8192] * 8)
        attention(32, 8, 128, block_size, 1, [2048] * 64)
        attention(32, 8, 128, block_size, 1, [1024] * 256)
    attention(32, 32, 128, 16, 1, [2048] * 64)
    attention(32, 8, 128, 16, 2048, [2048])
    attention(32, 8, 128, 16, 8192, [8192])
    attention(32, 8, 128, 16, 512, [2048] * 16)
    for num_tokens in (1, 64, 256, 8192):
        kv_write(8, 128, 16, num_tokens)
    for rows in (1, 64, 256):
        truncation(rows, 128256, 50, 1.0)
        truncation(rows, 128256, 0, 0.9)
    truncation(64, 128256, 0, 1.0)


if __name__ == "__main__":
    main()
