"""One tile of the decode attention kernel: FlashAttention's online softmax, in base 2, in registers.

The rows of an item are query tokens x query heads. With several KV heads to an item, a tile has some keys of all of
them, and the scores between a row and another head's keys are masked. That costs nothing: the rows of a wgmma are 64
however few of them are used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import load, over_columns
from pallas_kernels.ragged_paged_attention.plan_decode import TILE_ROWS, DecodeConfig, DecodeShape, Tiling

LOG2E = math.log2(math.e)
_MASKED = -1e30
_ZERO_SIDE = 64  # rows and columns rewritten at a time, to spare registers

#: Sum of weighted values f32[64, D], maximum f32[64] and sum f32[64] of weights.
Carry = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Static description of one launch: what the plan says, and the options of the call."""

    config: DecodeConfig
    shape: DecodeShape
    tiles: Tiling
    scale: float
    soft_cap: float | None
    interpret: bool

    @property
    def skips_masks(self) -> bool:
        """Whether tiles that every row sees whole get a loop of their own; at head_dim 256 two loops spill."""
        return self.shape.sliding_window is None and self.shape.head_dim < 256


@dataclasses.dataclass(frozen=True)
class Item:
    """What a stream does of one item: `count` tiles from tile `first` on, of row `row` of the plan's `seqs`. All are
    traced scalars. With prefixes a warpgroup has no registers for what follows from the row."""

    row: Any
    group: Any
    first: Any
    count: Any
    tiles: Any
    first_cell: Any
    kv_len: Any
    q_start: Any
    q_len: Any
    table_row: Any
    next_row: Any

    @property
    def whole(self) -> Any:
        return self.count == self.tiles


def is_prefix(item: Item) -> Any:
    """In a plan that finds prefixes."""
    return item.q_len > 1


def first_token(static: Kernel, item: Item) -> Any:
    """The index of an item's first token."""
    sharing = static.tiles.sharing
    if sharing == 1:
        return item.q_start
    place = lax.rem(item.row, jnp.int32(1 + sharing))
    return lax.div(item.row, jnp.int32(1 + sharing)) * sharing + jnp.maximum(place - 1, 0)


def seen_by_first_token(static: Kernel, item: Item) -> Any:
    """Keys that the first token of an item sees; the next one sees one more, but for prefixes, of which all see all."""
    return item.kv_len if static.shape.max_q_len == 1 else item.kv_len - item.q_len + 1


def start(static: Kernel, item: Item, sinks: Any) -> Carry:
    """(sum of weighted values, maximum, sum of weights) before the first tile; a sink is a key without a value."""
    rows = plgpu.Layout.WGMMA.reduce(1)
    maximum = plgpu.layout_cast(jnp.full((TILE_ROWS,), _MASKED, jnp.float32), rows)
    total = plgpu.layout_cast(jnp.zeros((TILE_ROWS,), jnp.float32), rows)
    if sinks is not None:
        counts = item.first == 0
        if static.tiles.sharing > 1:  # with the sequence's own item
            counts = counts & jnp.logical_not(is_prefix(item))
        maximum = load(sinks.at[item.group], rows) + jnp.where(counts, 0.0, _MASKED)
        total = total + jnp.where(counts, 1.0, 0.0)
    zeros = jnp.zeros((TILE_ROWS, static.shape.head_dim), jnp.float32)
    return plgpu.layout_cast(zeros, plgpu.Layout.WGMMA), maximum, total


def tile_first_key(static: Kernel, item: Item, tile: Any) -> Any:
    return (item.first_cell + tile * static.tiles.boxes) * static.tiles.cell


def tile_step(
    static: Kernel,
    item: Item,
    tile: Any,
    carry: Carry,
    q_smem: Any,
    ring: Any,
    full: Any,
    empty: Any,
    slots: tuple[Any, Any],
    *,
    masked: bool,
) -> Carry:
    """One step of the online softmax: the tile's K is in the first slot, its V in the second."""
    k_slot, v_slot = slots
    first_key = tile_first_key(static, item, tile)

    if masked:  # before the scores take registers
        plgpu.barrier_wait(full.at[v_slot])
        zero_unused_values(static, item, ring.at[v_slot], first_key)
    plgpu.barrier_wait(full.at[k_slot])
    scores = scores_of(static, q_smem, ring.at[k_slot])
    plgpu.barrier_arrive(empty.at[k_slot])
    carry, weights = softmax(carry, mask(static, item, first_key, scores, masked=masked))
    accumulator, maximum, total = carry

    if not masked:
        plgpu.barrier_wait(full.at[v_slot])
    accumulator = add_product(static, accumulator, weights.astype(q_smem.dtype), ring.at[v_slot])
    plgpu.barrier_arrive(empty.at[v_slot])
    return accumulator, maximum, total


def softmax(carry: Carry, scores: jax.Array) -> tuple[Carry, jax.Array]:
    """The carry after these scores, without the product of their weights and values, and the weights."""
    accumulator, maximum, total = carry
    new_maximum = jnp.maximum(maximum, scores.max(axis=1))
    correction = jnp.exp2(maximum - new_maximum)
    weights = jnp.exp2(scores - over_columns(new_maximum, scores.shape))
    total = total * correction + weights.sum(axis=1)
    accumulator = accumulator * over_columns(correction, accumulator.shape)
    return (accumulator, new_maximum, total), weights


def scores_of(static: Kernel, q_smem: Any, k_smem: Any, meanwhile: Callable[[], None] | None = None) -> jax.Array:
    """f32[64, columns] scores times log2(e), soft-capped; `meanwhile` runs during the product."""

    def product(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, q_smem, k_smem.transpose((1, 0)))
        if meanwhile is not None:
            meanwhile()
        return accumulator[...]

    shape = (TILE_ROWS, static.config.columns)
    scores = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
    if static.soft_cap is None:
        return scores * (static.scale * LOG2E)
    return jnp.tanh(scores * (static.scale / static.soft_cap)) * (static.soft_cap * LOG2E)


def _iota(static: Kernel, axis: int) -> jax.Array:
    shape = (TILE_ROWS, static.config.columns)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def mask(static: Kernel, item: Item, first_key: Any, scores: jax.Array, *, masked: bool) -> jax.Array:
    """The scores, _MASKED where a row does not see a key: another head's, and if `masked` a later or too old one.

    Written so that the compiler sees constants: what depends on the thread is the column's last three bits only.
    """
    tiles = static.tiles
    row, column = _iota(static, 0), _iota(static, 1)
    if static.config.heads > 1:
        row_head = lax.rem(row, tiles.token_rows) // static.shape.group_size
        column_head = lax.rem(column, tiles.box_rows) // tiles.cell
        scores = jnp.where(row_head == column_head, scores, _MASKED)
    if not masked:
        return scores
    eighth = column // 8 * 8
    key = eighth // tiles.box_rows * tiles.cell + lax.rem(eighth, tiles.cell)
    last = seen_by_first_token(static, item) - 1 - first_key - lax.rem(column, 8)
    if static.shape.max_q_len > 1:
        of_row = plgpu.broadcasted_iota(jnp.int32, (TILE_ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
        last = last + lax.broadcast_in_dim(of_row // tiles.token_rows, scores.shape, [0])
    scores = jnp.where(key <= last, scores, _MASKED)
    if static.shape.sliding_window is not None:
        scores = jnp.where(key > last - static.shape.sliding_window, scores, _MASKED)
    return scores


def visible_keys(static: Kernel, item: Item) -> tuple[Any, Any]:
    """[begin, end): the keys that some row of the item sees."""
    begin = jnp.int32(0)
    if static.shape.sliding_window is not None:
        begin = jnp.maximum(seen_by_first_token(static, item) - static.shape.sliding_window, 0)
    return begin, item.kv_len


def zero_unused_values(static: Kernel, item: Item, v_smem: Any, first_key: Any) -> None:
    """Zeroes the values that no row sees: their weight is 0, but an unwritten slot may hold NaN."""
    tiles, (begin, end) = static.tiles, visible_keys(static, item)

    @pl.when((first_key + tiles.tile_keys > end) | (first_key < begin))
    def _():
        side, parts = _ZERO_SIDE, static.shape.head_dim // _ZERO_SIDE

        def one_part(index: Any, _: Any) -> None:
            start, column = lax.div(index, jnp.int32(parts)) * side, lax.rem(index, jnp.int32(parts)) * side
            row = start + plgpu.broadcasted_iota(jnp.int32, (side, side), 0, layout=plgpu.Layout.WGMMA)
            key = first_key + row // tiles.box_rows * tiles.cell + lax.rem(row, tiles.cell)
            part = v_smem.at[pl.ds(start, side), pl.ds(column, side)]
            values = load(part, plgpu.Layout.WGMMA)
            part[...] = jnp.where((key >= begin) & (key < end), values, jnp.zeros_like(values))

        lax.fori_loop(0, static.config.columns // side * parts, one_part, None)
        plgpu.commit_smem()


def add_product(static: Kernel, accumulator: jax.Array, weights: jax.Array, v_smem: Any) -> jax.Array:
    """accumulator + weights @ values. Nothing may come between this wgmma and its wait.

    The weights are the wgmma's operand in registers, and ptxas before CUDA 13.3 may hand those registers to later
    instructions while the wgmma still reads them.
    """
    if static.interpret:  # the interpreter has no wgmma that accumulates in place; its plain read needs a fence
        product = jnp.dot(weights, v_smem[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()
        return accumulator + product
    product = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, v_smem))
    return product(plgpu.WGMMAAccumulatorRef.init(accumulator))  # pyright: ignore[reportReturnType]
