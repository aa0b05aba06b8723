"""Body of the decode attention kernel for Hopper: streams of tiles, a producer warp and a warpgroup for each.

The warp fills a ring of K and V tiles by TMA and runs on from one item to the next. The warpgroup keeps FlashAttention's
online softmax, in base 2, in registers. The rows of an item are query tokens x query heads; with several KV heads to an
item, a tile has some keys of all of them, and the scores between a row and another head's keys are masked. That
costs nothing: the rows of a wgmma are 64 however few of them are used.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import load
from pallas_kernels.ragged_paged_attention.plan_decode import TILE_ROWS, DecodeConfig, DecodeShape, Seq, Stream, Tiling

STAGED_COLUMNS = 64  # of a float32 result on its way out, also of values rewritten at a time
LOG2E = math.log2(math.e)
_MASKED = -1e30


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
    """What a stream does of one item: `count` tiles from tile `first` on. All are traced scalars."""

    seq: Any
    group: Any
    first: Any
    count: Any
    whole: Any
    first_cell: Any
    kv_len: Any
    q_start: Any
    q_len: Any
    table_row: Any


def kernel(
    static: Kernel, streams, seqs, tables, q_gmem, k_gmem, v_gmem, sinks, out, partial, lse, **scratch: Any
) -> None:
    """Body of one CTA: warpgroups 0 .. streams - 1 compute, a warp of the last one loads for each of them."""
    config = static.config
    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")

    @pl.when(wg < config.streams)
    def _compute():
        if config.streams > 1:
            plgpu.set_max_registers(232, action="increase")
        stream = wg * config.ctas + cta
        _consume(static, wg, stream, streams, seqs, q_gmem, sinks, out, partial, lse, **scratch)

    @pl.when(wg == config.streams)
    def _load():
        if config.streams > 1:
            plgpu.set_max_registers(40, action="decrease")

        @plgpu.warp_map
        def _warp(warp):
            @pl.when(warp < config.streams)
            def _():
                stream = warp * config.ctas + cta
                rings = (scratch["ring"], scratch["full"], scratch["empty"])
                _produce(static, warp, stream, streams, seqs, tables, k_gmem, v_gmem, *rings)


def _for_each_item(static: Kernel, stream: Any, streams: Any, seqs: Any, body: Callable[[Item, Any], None]) -> Any:
    """Calls body(item, number of the stream's tiles before it) for each item of a stream; returns its tiles."""
    total = streams[stream, Stream.TILES]

    def step(_: Any, state: Any) -> Any:
        seq, group, first, done = state
        tiles = seqs[seq, Seq.TILES]
        count = jnp.minimum(tiles - first, total - done)
        names = ("first_cell", "kv_len", "q_start", "q_len", "table_row")
        values = {name: seqs[seq, Seq[name.upper()]] for name in names}
        item = Item(seq=seq, group=group, first=first, count=count, whole=count == tiles, **values)
        pl.when(count > 0)(lambda: body(item, done))
        last = group == static.tiles.groups - 1
        return jnp.where(last, seq + 1, seq), jnp.where(last, 0, group + 1), jnp.int32(0), done + count

    state = (streams[stream, Stream.SEQ], streams[stream, Stream.GROUP], streams[stream, Stream.TILE], jnp.int32(0))
    lax.fori_loop(0, streams[stream, Stream.ITEMS], step, state)
    return total


def _slot(static: Kernel, fill: Any, index: Any) -> Any:
    """Place in the rings of the CTA of a stream's fill: K of tile i is fill 2 i, V fill 2 i + 1."""
    return index * static.config.stages + lax.rem(fill, jnp.int32(static.config.stages))


def _produce(
    static: Kernel,
    index: Any,
    stream: Any,
    streams: Any,
    seqs: Any,
    tables: Any,
    k_gmem: Any,
    v_gmem: Any,
    ring: Any,
    full: Any,
    empty: Any,
) -> None:
    """Fills the ring with all tiles of the stream, as fast as it is emptied."""
    tiles, stages = static.tiles, static.config.stages

    def fill_slot(fill: Any, gmem: Any, boxes: tuple[Any, ...]) -> None:
        slot = _slot(static, fill, index)
        pl.when(fill >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
        for j, box in enumerate(boxes):
            target = ring.at[slot, pl.ds(j * tiles.box_rows, tiles.box_rows)]
            plgpu.copy_gmem_to_smem(gmem.at[box], target, full.at[slot])

    def load_item(item: Item, done: Any) -> None:
        last_cell = (item.kv_len - 1) // tiles.cell

        def boxes_of(tile: Any) -> tuple[Any, ...]:
            """Rows of the caches, seen as [boxes, box_rows, D]; past the item's end those of its last cell."""
            boxes = []
            for j in range(tiles.boxes):
                cell = jnp.minimum(item.first_cell + tile * tiles.boxes + j, last_cell)
                block = tables[item.table_row, cell // tiles.parts]
                boxes.append((block * tiles.groups + item.group) * tiles.parts + lax.rem(cell, jnp.int32(tiles.parts)))
            return tuple(boxes)

        def load_tile(i: Any, boxes: tuple[Any, ...]) -> tuple[Any, ...]:
            next_boxes = boxes_of(item.first + i + 1)
            fill_slot(2 * (done + i), k_gmem, boxes)
            fill_slot(2 * (done + i) + 1, v_gmem, boxes)
            return next_boxes

        lax.fori_loop(0, item.count, load_tile, boxes_of(item.first))

    fills = 2 * _for_each_item(static, stream, streams, seqs, load_item)
    drain = lambda fill, _: plgpu.barrier_wait(empty.at[_slot(static, fill, index)])  # noqa: E731
    lax.fori_loop(jnp.maximum(fills - stages, 0), fills, drain, None)


def _consume(
    static: Kernel,
    index: Any,
    stream: Any,
    streams: Any,
    seqs: Any,
    q_gmem: Any,
    sinks: Any,
    out: Any,
    partial: Any,
    lse: Any,
    *,
    q_smem: Any,
    q_barriers: Any,
    ring: Any,
    full: Any,
    empty: Any,
    staged: Any,
) -> None:
    """Attends to the tiles of the stream and writes an output or a piece for each item."""
    tiles, tokens = static.tiles, static.shape.max_q_len
    q_smem, staged = q_smem.at[index], staged.at[index]

    def load_queries(item: Item) -> None:
        for i in range(tokens):  # past the sequence's end other tokens, which are never written
            token = jnp.minimum(item.q_start + i, q_gmem.shape[0] - 1)
            target = q_smem.at[pl.ds(i * tiles.token_rows, tiles.token_rows)]
            plgpu.copy_gmem_to_smem(q_gmem.at[token, item.group], target, q_barriers.at[index])
        plgpu.barrier_wait(q_barriers.at[index])

    def attend(item: Item, done: Any) -> None:
        load_queries(item)

        def step(i: Any, carry: Any, *, masked: bool) -> Any:
            slots = tuple(_slot(static, 2 * (done + i) + j, index) for j in range(2))
            return _tile(static, item, item.first + i, carry, q_smem, ring, full, empty, slots, masked=masked)

        unmasked = jnp.int32(0)
        carry = _start(static, item, sinks)
        if static.skips_masks:
            whole_tiles = (item.kv_len - item.q_len + 1) // tiles.tile_keys
            unmasked = jnp.clip(whole_tiles - item.first, 0, item.count)
            carry = lax.fori_loop(0, unmasked, functools.partial(step, masked=False), carry)
        accumulator, maximum, total = lax.fori_loop(unmasked, item.count, functools.partial(step, masked=True), carry)
        accumulator = accumulator / lax.broadcast_in_dim(total, accumulator.shape, [0])

        @pl.when(item.whole)
        def _finished():
            q_smem[...] = accumulator.astype(q_smem.dtype)
            plgpu.commit_smem()
            for i in range(tokens):
                source = q_smem.at[pl.ds(i * tiles.token_rows, tiles.token_rows)]
                target = out.at[jnp.minimum(item.q_start + i, out.shape[0] - 1), item.group]
                pl.when(i < item.q_len)(lambda source=source, target=target: plgpu.copy_smem_to_gmem(source, target))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(jnp.logical_not(item.whole))
        def _piece():
            slot = 2 * stream + jnp.where(item.first == 0, 1, 0)
            lse[slot] = maximum + jnp.log2(total)
            rows = pl.ds(0, tokens * tiles.token_rows)
            for column in range(0, static.shape.head_dim, STAGED_COLUMNS):
                staged[...] = accumulator[:, column : column + STAGED_COLUMNS]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staged.at[rows], partial.at[slot, :, pl.ds(column, STAGED_COLUMNS)])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    _for_each_item(static, stream, streams, seqs, attend)


def _start(static: Kernel, item: Item, sinks: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sum of weighted values, maximum, sum of weights) before the first tile; a sink is a key without a value."""
    rows = plgpu.Layout.WGMMA.reduce(1)
    maximum = plgpu.layout_cast(jnp.full((TILE_ROWS,), _MASKED, jnp.float32), rows)
    total = plgpu.layout_cast(jnp.zeros((TILE_ROWS,), jnp.float32), rows)
    if sinks is not None:
        begins = item.first == 0
        maximum = jnp.where(begins, load(sinks.at[item.group], rows), maximum)
        total = jnp.where(begins, 1.0, total)
    zeros = jnp.zeros((TILE_ROWS, static.shape.head_dim), jnp.float32)
    return plgpu.layout_cast(zeros, plgpu.Layout.WGMMA), maximum, total


def _tile(
    static: Kernel,
    item: Item,
    tile: Any,
    carry: Any,
    q_smem: Any,
    ring: Any,
    full: Any,
    empty: Any,
    slots: tuple[Any, Any],
    *,
    masked: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step of the online softmax: the tile's K is in the first slot, its V in the second."""
    accumulator, maximum, total = carry
    k_slot, v_slot = slots
    first_key = (item.first_cell + tile * static.tiles.boxes) * static.tiles.cell

    plgpu.barrier_wait(full.at[k_slot])
    scores = _scores(static, q_smem, ring.at[k_slot])
    plgpu.barrier_arrive(empty.at[k_slot])
    visible = _visible(static, item, first_key, masked=masked)
    if visible is not None:
        scores = jnp.where(visible, scores, _MASKED)

    new_maximum = jnp.maximum(maximum, scores.max(axis=1))
    correction = jnp.exp2(maximum - new_maximum)
    weights = jnp.exp2(scores - lax.broadcast_in_dim(new_maximum, scores.shape, [0]))
    total = total * correction + weights.sum(axis=1)
    accumulator = accumulator * lax.broadcast_in_dim(correction, accumulator.shape, [0])

    plgpu.barrier_wait(full.at[v_slot])
    if masked:
        _zero_unused_values(static, item, ring.at[v_slot], first_key)
    accumulator = _add_product(static, accumulator, weights.astype(q_smem.dtype), ring.at[v_slot])
    plgpu.barrier_arrive(empty.at[v_slot])
    return accumulator, new_maximum, total


def _scores(static: Kernel, q_smem: Any, k_smem: Any) -> jax.Array:
    """f32[64, columns] scores times log2(e), soft-capped."""

    def product(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, q_smem, k_smem.transpose((1, 0)))
        return accumulator[...]

    shape = (TILE_ROWS, static.config.columns)
    scores = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
    if static.soft_cap is None:
        return scores * (static.scale * LOG2E)
    return jnp.tanh(scores * (static.scale / static.soft_cap)) * (static.soft_cap * LOG2E)


def _iota(static: Kernel, axis: int) -> jax.Array:
    shape = (TILE_ROWS, static.config.columns)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def _visible(static: Kernel, item: Item, first_key: Any, *, masked: bool) -> jax.Array | None:
    """bool[64, columns]: whether a row sees a key of its own head; None: all do."""
    tiles, heads = static.tiles, static.config.heads
    row, column = _iota(static, 0), _iota(static, 1)
    row_head = lax.rem(row, tiles.token_rows) // static.shape.group_size
    own = None if heads == 1 else row_head == lax.rem(column, tiles.box_rows) // tiles.cell
    if not masked:
        return own
    key = first_key + column // tiles.box_rows * tiles.cell + lax.rem(column, tiles.cell)
    position = item.kv_len - item.q_len + row // tiles.token_rows
    visible = key <= position
    if static.shape.sliding_window is not None:
        visible &= key > position - static.shape.sliding_window
    return visible if own is None else visible & own


def _zero_unused_values(static: Kernel, item: Item, v_smem: Any, first_key: Any) -> None:
    """Zeroes the values that no row sees: their weight is 0, but an unwritten slot may hold NaN."""
    tiles, begin = static.tiles, jnp.int32(0)
    if static.shape.sliding_window is not None:
        begin = jnp.maximum(item.kv_len - item.q_len - (static.shape.sliding_window - 1), 0)

    @pl.when((first_key + tiles.tile_keys > item.kv_len) | (first_key < begin))
    def _():
        shape = (static.config.columns, STAGED_COLUMNS)
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        key = first_key + row // tiles.box_rows * tiles.cell + lax.rem(row, tiles.cell)
        for column in range(0, static.shape.head_dim, STAGED_COLUMNS):
            part = v_smem.at[:, pl.ds(column, STAGED_COLUMNS)]
            values = load(part, plgpu.Layout.WGMMA)
            part[...] = jnp.where((key >= begin) & (key < item.kv_len), values, jnp.zeros_like(values))
        plgpu.commit_smem()


def _add_product(static: Kernel, accumulator: jax.Array, weights: jax.Array, v_smem: Any) -> jax.Array:
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
