"""The prefill part of one step's attention, cut into query tiles on the device; built once a step, for all layers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

ROW_ALIGNMENT = 8
"""Tiles start at multiples of this many tokens of the step: the row group of a swizzled TMA tile."""

START, SKIP, STOP, POSITION, END, TABLE_ROW = range(6)
"""Columns of PrefillPlan.tiles."""

_UNSEEN = -(2**24)  # a position before every key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillPlan:
    """Query tiles of one step, those with the most keys first. A tile holds tokens of one sequence.

    Tiles start at multiples of ROW_ALIGNMENT tokens, so a sequence's first tile may begin with a few tokens of its
    neighbour (SKIP) and its last one may end with some (from STOP on): neither are stored.

    Attributes:
        block_tables: i32[N, B], block ids of each persistent row, in order of position.
        tiles: i32[NT, 6]: START, index of the tile's first token in the step; SKIP and STOP, the offsets in the tile
            where its sequence's tokens begin and end; POSITION, the position of the tile's first token (of the
            sequence's; it may be negative when SKIP is not 0); END, the number of keys that the tile's last token
            sees without a window, 0 for padding; TABLE_ROW, row of block_tables.
        num_tiles: i32[1], how many of the tiles are used.
        tile_tokens: Tokens of a tile, static.
        block_size: Tokens per block of the cache, static.
    """

    block_tables: jax.Array
    tiles: jax.Array
    num_tiles: jax.Array
    tile_tokens: int = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})


def max_tiles(num_tokens: int, num_seqs: int, tile_tokens: int, min_tokens: int = 1) -> int:
    """Upper bound of the tiles that any split of num_tokens into num_seqs sequences and padding needs."""
    segments = min(num_seqs, num_tokens // min_tokens) + 1
    return max(1, (num_tokens + segments * (tile_tokens + ROW_ALIGNMENT - 2)) // tile_tokens)


def plan_prefill(
    block_tables: jax.Array,
    table_rows: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    *,
    num_tokens: int,
    tile_tokens: int,
    block_size: int,
    min_tokens: int = 1,
) -> PrefillPlan:
    """Cuts a step's prefill into query tiles, on the device, without a sort or a loop.

    Sequences with fewer than min_tokens tokens get no tiles: a decode kernel writes their rows. The padding tokens,
    from cu_q_lens[S] on, get tiles without keys, which write zeros.

    Args:
        block_tables, table_rows, cu_q_lens, kv_lens: As for plan_attention.
        num_tokens: T, the (padded) number of tokens of the step.
        tile_tokens: Tokens of a tile, a multiple of ROW_ALIGNMENT.
        block_size: Tokens per block of the cache.
        min_tokens: Static; 1 takes every sequence.
    """
    if tile_tokens % ROW_ALIGNMENT:
        raise ValueError(f"tile_tokens is {tile_tokens}; it must be a multiple of {ROW_ALIGNMENT}")
    num_seqs = kv_lens.shape[0]
    zero = jnp.zeros(1, jnp.int32)
    first = cu_q_lens
    last = jnp.concatenate([cu_q_lens[1:], jnp.full(1, num_tokens, jnp.int32)])
    length = last - first
    is_padding = jnp.arange(num_seqs + 1, dtype=jnp.int32) == num_seqs
    wanted = jnp.where(is_padding, length > 0, length >= min_tokens)
    context = jnp.concatenate([kv_lens - length[:-1], jnp.full(1, _UNSEEN, jnp.int32)])
    rows = jnp.concatenate([table_rows, zero])

    aligned = first // ROW_ALIGNMENT * ROW_ALIGNMENT
    count = jnp.where(wanted, (last - aligned + (tile_tokens - 1)) // tile_tokens, 0)
    ends = jnp.cumsum(count, dtype=jnp.int32)
    tile = jnp.arange(max_tiles(num_tokens, num_seqs, tile_tokens, min_tokens), dtype=jnp.int32)
    seq = jnp.minimum(jnp.sum(tile[:, None] >= ends[None, :], axis=1, dtype=jnp.int32), jnp.int32(num_seqs))
    start = aligned[seq] + (tile - (ends - count)[seq]) * tile_tokens
    stop = jnp.clip(last[seq] - start, 0, tile_tokens)
    position = context[seq] + start - first[seq]
    end = jnp.where(tile < ends[-1], jnp.maximum(position + stop, 0), -1)
    columns = [start, jnp.maximum(first[seq] - start, 0), stop, position, end, rows[seq]]
    return PrefillPlan(
        block_tables=block_tables,
        tiles=_longest_first(jnp.stack(columns, axis=1), end),
        num_tiles=ends[-1:],
        tile_tokens=tile_tokens,
        block_size=block_size,
    )


def _longest_first(tiles: jax.Array, keys: jax.Array) -> jax.Array:
    """Rows of `tiles` by descending `keys`, in order where these are equal: each row's rank is a count."""
    index = jnp.arange(keys.shape[0], dtype=jnp.int32)
    before = (keys[None, :] > keys[:, None]) | ((keys[None, :] == keys[:, None]) & (index[None, :] < index[:, None]))
    rank = jnp.sum(before, axis=1, dtype=jnp.int32)
    order = jnp.sum(jnp.where(rank[None, :] == index[:, None], index[None, :], 0), axis=1, dtype=jnp.int32)
    return tiles[order]
