"""Moving queries into a plan's tiles and outputs back to tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.plan import AttentionPlan


def query_tiles(q: jax.Array, plan: AttentionPlan) -> jax.Array:
    """[NT, KVH, tile_tokens * G, D] of q [T, H, D]: row r is head r % G of the group, of token r // G of the tile.

    Rows past a tile's length hold other tokens' queries; what is computed for them is never read.
    """
    num_tiles, group = plan.tile_start.shape[0], plan.num_q_heads // plan.num_kv_heads
    if not plan.decode_only:
        token = plan.tile_start[:, None] + jnp.arange(plan.tile_tokens, dtype=jnp.int32)
        q = q[jnp.minimum(token, jnp.int32(q.shape[0] - 1))]
    q = q.reshape(num_tiles, plan.tile_tokens, plan.num_kv_heads, group, plan.head_dim)
    return jnp.swapaxes(q, 1, 2).reshape(num_tiles, plan.num_kv_heads, -1, plan.head_dim)


def tokens(tiles: jax.Array, plan: AttentionPlan) -> jax.Array:
    """[T, H, D] of the tiles' outputs [NT, KVH, tile_tokens * G, D]; zeros for padding tokens.

    With decode_only, tiles of padding tokens must hold zeros already.
    """
    num_tiles, group = tiles.shape[0], plan.num_q_heads // plan.num_kv_heads
    tiles = tiles.reshape(num_tiles, plan.num_kv_heads, plan.tile_tokens, group, plan.head_dim)
    rows = jnp.swapaxes(tiles, 1, 2).reshape(num_tiles * plan.tile_tokens, plan.num_q_heads, plan.head_dim)
    if plan.decode_only:
        return rows
    found = rows[jnp.maximum(plan.token_row, 0)]
    return jnp.where((plan.token_row >= 0)[:, None, None], found, jnp.zeros_like(found))
