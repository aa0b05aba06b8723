"""The query tiles of one step for the XLA implementation: their plan, queries into them and outputs out of them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

_TILE_TOKENS = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TilePlan:
    """Query tiles of one step. A tile is up to `tile_tokens` consecutive tokens of one sequence.

    Attributes:
        block_tables: i32[N, B], as passed to plan_attention.
        table_row: i32[NT], row of block_tables that belongs to the tile's sequence.
        start: i32[NT], index of the tile's first token in the step.
        length: i32[NT], number of tokens, 0 for an unused tile.
        position: i32[NT], position (in its sequence) of the tile's first token.
        token_row: i32[T], tile * tile_tokens + offset in that tile, -1 for padding tokens.
        tile_tokens: Tokens per tile, static.
        tile_is_token: Tile i holds token i or nothing, static.
    """

    block_tables: jax.Array
    table_row: jax.Array
    start: jax.Array
    length: jax.Array
    position: jax.Array
    token_row: jax.Array
    tile_tokens: int = dataclasses.field(metadata={"static": True})
    tile_is_token: bool = dataclasses.field(metadata={"static": True})


def plan_tiles(
    block_tables: jax.Array,
    table_rows: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    *,
    num_tokens: int,
    max_q_len: int | None,
) -> TilePlan:
    """Cuts a step into tiles by comparison with prefix sums, without a sort or a loop.

    Args:
        block_tables, table_rows, cu_q_lens, kv_lens: As for plan_attention.
        num_tokens: T, the (padded) number of tokens of the step.
        max_q_len: Promise that no sequence has more tokens; 1 promises too that token s is sequence s. None: nothing.
    """
    num_seqs = kv_lens.shape[0]
    tile_tokens = max_q_len or _TILE_TOKENS
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    seq_tiles = (q_lens + (tile_tokens - 1)) // tile_tokens
    tile_ends = jnp.cumsum(seq_tiles, dtype=jnp.int32)
    tile_begins = tile_ends - seq_tiles

    num_tiles = num_seqs if max_q_len else min(num_tokens, num_tokens // tile_tokens + num_seqs)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    seq = _owner(tile, tile_ends)
    first = (tile - tile_begins[seq]) * tile_tokens
    length = jnp.where(tile < tile_ends[-1], jnp.clip(q_lens[seq] - first, 0, tile_tokens), 0)

    token = jnp.arange(num_tokens, dtype=jnp.int32)
    token_seq = _owner(token, cu_q_lens[1:])
    token_row = tile_begins[token_seq] * tile_tokens + token - cu_q_lens[token_seq]
    return TilePlan(
        block_tables=block_tables,
        table_row=table_rows[seq],
        start=jnp.where(length > 0, cu_q_lens[seq] + first, 0),
        length=length,
        position=jnp.where(length > 0, kv_lens[seq] - q_lens[seq] + first, 0),
        token_row=jnp.where(token < cu_q_lens[-1], token_row, -1),
        tile_tokens=tile_tokens,
        tile_is_token=max_q_len == 1,
    )


def _owner(index: jax.Array, ends: jax.Array) -> jax.Array:
    """For each index the segment that holds it, given the segments' ends; the last segment when there is none."""
    owner = jnp.sum(index[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    return jnp.minimum(owner, jnp.int32(ends.shape[0] - 1))


def query_tiles(q: jax.Array, tiles: TilePlan, num_kv_heads: int) -> jax.Array:
    """[NT, KVH, tile_tokens * G, D] of q [T, H, D]: row r is head r % G of the group, of token r // G of the tile.

    Rows past a tile's length hold other tokens' queries; what is computed for them is never read.
    """
    num_tiles, head_dim = tiles.start.shape[0], q.shape[2]
    if not tiles.tile_is_token:
        token = tiles.start[:, None] + jnp.arange(tiles.tile_tokens, dtype=jnp.int32)
        q = q[jnp.minimum(token, jnp.int32(q.shape[0] - 1))]
    q = q.reshape(num_tiles, tiles.tile_tokens, num_kv_heads, -1, head_dim)
    return jnp.swapaxes(q, 1, 2).reshape(num_tiles, num_kv_heads, -1, head_dim)


def tokens(outputs: jax.Array, tiles: TilePlan) -> jax.Array:
    """[T, H, D] of the tiles' outputs [NT, KVH, tile_tokens * G, D]; zeros for padding tokens.

    Where a tile is a token, the tiles of padding tokens must hold zeros already.
    """
    num_tiles, num_kv_heads, _, head_dim = outputs.shape
    outputs = outputs.reshape(num_tiles, num_kv_heads, tiles.tile_tokens, -1, head_dim)
    rows = jnp.swapaxes(outputs, 1, 2).reshape(num_tiles * tiles.tile_tokens, -1, head_dim)
    if tiles.tile_is_token:
        return rows
    found = rows[jnp.maximum(tiles.token_row, 0)]
    return jnp.where((tiles.token_row >= 0)[:, None, None], found, jnp.zeros_like(found))
