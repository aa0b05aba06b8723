"""The work of one step's attention, cut into query tiles on the device; built once a step, used by every layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.implementation import (
    MOSAIC_GPU,
    check_mosaic_cache,
    checked_implementation,
    default_implementation,
    is_mosaic,
)
from pallas_kernels.ragged_paged_attention import hopper
from pallas_kernels.ragged_paged_attention.plan_decode import DecodePlan, DecodeShape
from pallas_kernels.ragged_paged_attention.plan_prefill import PrefillPlan
from pallas_kernels.validation import Array, check_array, check_block_size

MOSAIC_TILE_ROWS = 64
"""Rows (query tokens x query heads of one KV head) that a Mosaic GPU tile holds: the M of one wgmma."""

_XLA_TILE_TOKENS = 16
_NUM_SMS = 132
_CTAS_PER_SM = 2
_MAX_SPLITS = 64
_SPLIT_KEYS = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """Query tiles of one step. A tile is up to `tile_tokens` consecutive tokens of one sequence.

    Attributes:
        block_tables: i32[N, B], as passed to plan_attention.
        tile_table_row: i32[NT], row of block_tables that belongs to the tile's sequence.
        tile_start: i32[NT], index of the tile's first token in the step.
        tile_len: i32[NT], number of tokens, 0 for an unused tile.
        tile_pos: i32[NT], position (in its sequence) of the tile's first token.
        token_row: i32[T], tile * tile_tokens + offset in that tile, -1 for padding tokens.
        block_size, num_q_heads, num_kv_heads, head_dim: of the model and its cache, static.
        tile_tokens: Tokens per tile, static.
        num_splits: How many CTAs share one tile's keys (Mosaic decode), static.
        decode_only: Tile, token and sequence index are the same thing, static.
        implementation: Which implementation the plan is for, static.
    """

    block_tables: jax.Array
    tile_table_row: jax.Array
    tile_start: jax.Array
    tile_len: jax.Array
    tile_pos: jax.Array
    token_row: jax.Array
    decodes: tuple[DecodePlan, ...]
    prefill: PrefillPlan | None
    block_size: int = dataclasses.field(metadata={"static": True})
    num_q_heads: int = dataclasses.field(metadata={"static": True})
    num_kv_heads: int = dataclasses.field(metadata={"static": True})
    head_dim: int = dataclasses.field(metadata={"static": True})
    tile_tokens: int = dataclasses.field(metadata={"static": True})
    num_splits: int = dataclasses.field(metadata={"static": True})
    decode_only: bool = dataclasses.field(metadata={"static": True})
    implementation: str = dataclasses.field(metadata={"static": True})


def plan_attention(
    block_tables: Array,
    table_rows: Array,
    cu_q_lens: Array,
    kv_lens: Array,
    *,
    num_tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: DTypeLike,
    decode_only: bool,
    sliding_windows: Sequence[int | None] = (None,),
    implementation: str | None = None,
) -> AttentionPlan:
    """Cuts a step into query tiles, on the device.

    Sequence s owns the tokens cu_q_lens[s] to cu_q_lens[s+1]; its last token has position kv_lens[s] - 1, so kv_lens
    includes this step's tokens. Padding sequences come last and have no tokens and kv_len 0. Tokens from cu_q_lens[S]
    on are padding.

    Args:
        block_tables: i32[N, B], block ids of each persistent row, in order of position.
        table_rows: i32[S], the row of block_tables of each sequence.
        cu_q_lens: i32[S + 1], prefix sums of the sequences' token counts.
        kv_lens: i32[S], keys of each sequence.
        num_tokens: T, the (padded) number of tokens of the step.
        num_q_heads: Query heads, a multiple of num_kv_heads.
        num_kv_heads: KV heads.
        head_dim: Last axis of the KV cache (after padded_head_dim).
        block_size: Tokens per block: 16, 32, 64 or 128.
        dtype: Dtype of the KV cache.
        decode_only: Promise that T == S and token s is the only token of sequence s, or padding.
        implementation: One of IMPLEMENTATIONS; None takes default_implementation(dtype, head_dim).

    Raises:
        ValueError: A shape, dtype or size is wrong.
        NotImplementedError: The implementation cannot serve this head dim, dtype or group size; "xla" can.
    """
    block_tables, table_rows, cu_q_lens, kv_lens = map(jnp.asarray, (block_tables, table_rows, cu_q_lens, kv_lens))
    check_array("block_tables", block_tables, (None, None), jnp.int32)
    check_array("table_rows", table_rows, (None,), jnp.int32)
    num_seqs = table_rows.shape[0]
    check_array("cu_q_lens", cu_q_lens, (num_seqs + 1,), jnp.int32)
    check_array("kv_lens", kv_lens, (num_seqs,), jnp.int32)
    check_block_size(block_size)
    if num_kv_heads < 1 or num_q_heads % num_kv_heads:
        raise ValueError(f"num_q_heads is {num_q_heads}; it must be a multiple of num_kv_heads, {num_kv_heads}")
    if decode_only and num_tokens != num_seqs:
        raise ValueError(f"num_tokens is {num_tokens}; decode_only needs one token a sequence, {num_seqs}")
    chosen = checked_implementation(implementation or default_implementation(dtype, head_dim))
    group = num_q_heads // num_kv_heads
    if is_mosaic(chosen):
        _check_mosaic(dtype, head_dim, group)
    tile_tokens = _tile_tokens(chosen, decode_only, group)
    max_keys = block_tables.shape[1] * block_size
    tiles = _tiles(cu_q_lens, kv_lens, num_tokens, tile_tokens)
    decodes, prefill = (), None
    if chosen == MOSAIC_GPU:
        metadata = (block_tables, table_rows, cu_q_lens, kv_lens)
        shape = DecodeShape(num_seqs, num_q_heads, num_kv_heads, head_dim, block_size)
        decodes = hopper.plan_decodes(metadata, shape, sliding_windows, dtype)
        if decodes and not decode_only:
            prefill = hopper.plan_prefills(metadata, shape, num_tokens)
            decodes = decodes if prefill is not None else ()
    return AttentionPlan(
        block_tables=block_tables,
        tile_table_row=table_rows[tiles["seq"]],
        tile_start=tiles["start"],
        tile_len=tiles["len"],
        tile_pos=tiles["pos"],
        token_row=tiles["token_row"],
        decodes=decodes,
        prefill=prefill,
        block_size=block_size,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        tile_tokens=tile_tokens,
        num_splits=_num_splits(chosen, decode_only, num_seqs * num_kv_heads, max_keys),
        decode_only=decode_only,
        implementation=chosen,
    )


def _check_mosaic(dtype: DTypeLike, head_dim: int, group: int) -> None:
    check_mosaic_cache(dtype, head_dim)
    if group > MOSAIC_TILE_ROWS:
        raise NotImplementedError(
            f"{group} query heads share a KV head; mosaic_gpu takes at most {MOSAIC_TILE_ROWS}: "
            "use implementation='xla'"
        )


def _tile_tokens(implementation: str, decode_only: bool, group: int) -> int:
    if decode_only:
        return 1
    return MOSAIC_TILE_ROWS // group if is_mosaic(implementation) else _XLA_TILE_TOKENS


def _num_splits(implementation: str, decode_only: bool, items: int, max_keys: int) -> int:
    """Splits of a decode tile: enough CTAs for two on each SM, and at least one step of keys for each split."""
    if not (is_mosaic(implementation) and decode_only):
        return 1
    wanted = -(-_CTAS_PER_SM * _NUM_SMS // items)
    return max(1, min(wanted, _MAX_SPLITS, -(-max_keys // _SPLIT_KEYS)))


def _tiles(cu_q_lens: jax.Array, kv_lens: jax.Array, num_tokens: int, tile_tokens: int) -> dict[str, jax.Array]:
    """Tile arrays by comparison against prefix sums: no sort and no loop, so it stays inside a CUDA graph."""
    num_seqs = kv_lens.shape[0]
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    seq_tiles = (q_lens + (tile_tokens - 1)) // tile_tokens
    tile_ends = jnp.cumsum(seq_tiles, dtype=jnp.int32)
    tile_begins = tile_ends - seq_tiles

    num_tiles = min(num_tokens, num_tokens // tile_tokens + num_seqs)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    seq = _owner(tile, tile_ends)
    first = (tile - tile_begins[seq]) * tile_tokens
    length = jnp.where(tile < tile_ends[-1], jnp.clip(q_lens[seq] - first, 0, tile_tokens), 0)

    token = jnp.arange(num_tokens, dtype=jnp.int32)
    token_seq = _owner(token, cu_q_lens[1:])
    token_row = tile_begins[token_seq] * tile_tokens + token - cu_q_lens[token_seq]
    return {
        "seq": seq,
        "start": jnp.where(length > 0, cu_q_lens[seq] + first, 0),
        "len": length,
        "pos": jnp.where(length > 0, kv_lens[seq] - q_lens[seq] + first, 0),
        "token_row": jnp.where(token < cu_q_lens[-1], token_row, -1),
    }


def _owner(index: jax.Array, ends: jax.Array) -> jax.Array:
    """For each index the segment that holds it, given the segments' ends; the last segment when there is none."""
    owner = jnp.sum(index[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    return jnp.minimum(owner, jnp.int32(ends.shape[0] - 1))
