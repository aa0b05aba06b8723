"""Ragged paged attention in plain XLA: flash attention (Dao, arXiv 2205.14135) over chunks of gathered blocks.

The CPU implementation. A loop runs over chunks of keys up to the longest tile; each trip gathers one chunk of blocks
for every tile, so the cache itself is never copied, converted or transposed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.ragged_paged_attention.tiles import TilePlan, query_tiles, tokens

_CHUNK_KEYS = 64
_MASKED = -1e30


class _Softmax(NamedTuple):
    """Online softmax state of every row: running maximum, sum and unnormalised output, float32."""

    maximum: jax.Array  # [NT, KVH, M, 1]
    total: jax.Array  # [NT, KVH, M, 1]
    output: jax.Array  # [NT, KVH, M, D]


def attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    plan: TilePlan,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """See api.ragged_paged_attention."""
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    group = q.shape[1] // num_kv_heads
    queries = query_tiles(q, plan, num_kv_heads).astype(jnp.float32) * jnp.float32(scale)

    blocks_per_chunk = max(1, _CHUNK_KEYS // block_size)
    chunk_keys = blocks_per_chunk * block_size
    tables = plan.block_tables[plan.table_row]
    tile_end = plan.position + plan.length
    tile_begin = jnp.zeros_like(plan.position)
    if sliding_window is not None:
        tile_begin = jnp.maximum(plan.position - (sliding_window - 1), 0)
    row_pos = plan.position[:, None] + jnp.arange(plan.tile_tokens, dtype=jnp.int32)
    row_pos = jnp.repeat(row_pos, group, axis=1)[:, None, :, None]

    def gather(cache: jax.Array, ids: jax.Array) -> jax.Array:
        """[NT, KVH, chunk_keys, D] in float32."""
        blocks = jnp.swapaxes(cache[ids], 1, 2)
        return blocks.reshape(ids.shape[0], num_kv_heads, chunk_keys, head_dim).astype(jnp.float32)

    def step(chunk: jax.Array, state: _Softmax) -> _Softmax:
        column = chunk * blocks_per_chunk + jnp.arange(blocks_per_chunk, dtype=jnp.int32)
        ids = tables[:, jnp.minimum(column, jnp.int32(tables.shape[1] - 1))]
        key_pos = chunk * chunk_keys + jnp.arange(chunk_keys, dtype=jnp.int32)
        keys, values = gather(k_cache, ids), gather(v_cache, ids)
        scores = jnp.einsum("nkmd,nkcd->nkmc", queries, keys, precision="highest")
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        visible = (key_pos <= row_pos) & (key_pos < tile_end[:, None, None, None])
        if sliding_window is not None:
            visible &= key_pos > row_pos - sliding_window
        maximum = jnp.maximum(state.maximum, jnp.max(scores, axis=-1, keepdims=True, initial=_MASKED, where=visible))
        weights = jnp.where(visible, jnp.exp(scores - maximum), 0.0)
        correction = jnp.exp(state.maximum - maximum)
        # Slots outside the tile's range may hold anything, NaN included, and 0 * NaN is NaN.
        in_range = (key_pos >= tile_begin[:, None]) & (key_pos < tile_end[:, None])
        values = jnp.where(in_range[:, None, :, None], values, 0.0)
        update = jnp.einsum("nkmc,nkcd->nkmd", weights, values, precision="highest")
        total = state.total * correction + jnp.sum(weights, axis=-1, keepdims=True)
        return _Softmax(maximum, total, state.output * correction + update)

    rows = (*queries.shape[:3], 1)
    maximum, total = jnp.full(rows, _MASKED, jnp.float32), jnp.zeros(rows, jnp.float32)
    if sinks is not None:
        of_row = jnp.tile(sinks.reshape(num_kv_heads, group), (1, plan.tile_tokens))[..., None]
        maximum, total = jnp.broadcast_to(of_row, rows), jnp.ones(rows, jnp.float32)
    state = _Softmax(maximum, total, jnp.zeros_like(queries))
    last_chunk = (jnp.max(tile_end) + (chunk_keys - 1)) // chunk_keys
    unused = jnp.where(plan.length > 0, tile_begin, jnp.max(tile_end))
    state = lax.fori_loop(jnp.min(unused) // chunk_keys, last_chunk, step, state)
    output = jnp.where(state.total > 0, state.output / jnp.where(state.total > 0, state.total, 1.0), 0.0)
    return tokens(output, plan).astype(q.dtype)
