"""Body of the decode attention kernel for Hopper: streams of tiles, a producer warp and a warpgroup for each.

The warp fills a ring of K and V tiles by TMA and runs on from one item to the next, so that the memory never waits for
the end of an item. The warpgroup computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import divide_registers, over_columns
from pallas_kernels.ragged_paged_attention.mosaic_decode_fp8 import fp8_tile_step
from pallas_kernels.ragged_paged_attention.mosaic_decode_tile import (
    Item,
    Kernel,
    first_token,
    is_prefix,
    seen_by_first_token,
    start,
    tile_step,
)
from pallas_kernels.ragged_paged_attention.plan_decode import Seq, Stream, slot_of_whole

_MANY_BOXES = 8  # of a tile: a warp that loads then needs more registers


def _registers(static: Kernel) -> tuple[int, int] | None:
    """Of a thread that computes and of one that loads; None: no limit."""
    streams = static.config.streams
    if streams == 1:
        return None
    if streams == 3:
        return divide_registers(160, 3, 32)
    return divide_registers(224, 2, 56) if static.tiles.boxes >= _MANY_BOXES else divide_registers(232, 2, 40)


def kernel(
    static: Kernel, streams, seqs, tables, q_gmem, k_gmem, v_gmem, sinks, out, partial, lse, **scratch: Any
) -> None:
    """Body of one CTA: warpgroups 0 .. streams - 1 compute, a warp of the last one loads for each of them."""
    config, registers = static.config, _registers(static)
    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")

    @pl.when(wg < config.streams)
    def _compute():
        if registers is not None:
            plgpu.set_max_registers(registers[0], action="increase")
        stream = wg * config.ctas + cta
        _consume(static, wg, stream, streams, seqs, q_gmem, sinks, out, partial, lse, **scratch)

    @pl.when(wg == config.streams)
    def _load():
        if registers is not None:
            plgpu.set_max_registers(registers[1], action="decrease")

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
        seq, group, first, done, fields = state
        wraps = group == static.tiles.groups - 1
        next_seq = jnp.where(wraps, fields[Seq.NEXT], seq)
        next_row = jnp.minimum(next_seq, seqs.shape[0] - 1)
        next_fields = tuple(seqs[next_row, field] for field in Seq)
        count = jnp.minimum(fields[Seq.TILES] - first, total - done)
        item = Item(seq, group, first, count, *fields)
        pl.when(count > 0)(lambda: body(item, done))
        return next_seq, jnp.where(wraps, 0, group + 1), jnp.int32(0), done + count, next_fields

    state = (
        streams[stream, Stream.SEQ],
        streams[stream, Stream.GROUP],
        streams[stream, Stream.TILE],
        jnp.int32(0),
        tuple(streams[stream, Stream.FIRST_ITEM + field] for field in Seq),
    )
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
    converted: Any = None,
    prefix_barriers: Any = None,
) -> None:
    """Attends to the tiles of the stream and writes an output or a piece for each item."""
    tiles, tokens = static.tiles, static.shape.max_q_len
    q_smem, staged = q_smem.at[index], staged.at[index]
    count = static.config.converted
    converted = () if converted is None else tuple(converted.at[index * count + i] for i in range(count))

    def load_token(item: Item, i: Any, barrier: Any) -> None:
        """Past the item's end another token, which is never written."""
        token = jnp.minimum(first_token(static, item) + i, q_gmem.shape[0] - 1)
        target = q_smem.at[pl.ds(i * tiles.token_rows, tiles.token_rows)]
        plgpu.copy_gmem_to_smem(q_gmem.at[token, item.group], target, barrier)

    def load_queries(item: Item) -> None:
        def load_one_each() -> None:
            for i in range(tokens):
                load_token(item, i, q_barriers.at[index])
            plgpu.barrier_wait(q_barriers.at[index])

        def load_prefix() -> None:
            barrier = prefix_barriers.at[index]
            # `sharing` times, but unrolled the addresses of all copies would stay in registers.
            lax.fori_loop(0, item.q_len, lambda i, _: load_token(item, i, barrier), None)
            plgpu.barrier_wait(barrier)

        if tiles.sharing == 1:
            load_one_each()
            return
        shares = is_prefix(item)
        pl.when(shares)(load_prefix)
        pl.when(jnp.logical_not(shares))(load_one_each)

    def attend(item: Item, done: Any) -> None:
        load_queries(item)

        def step(i: Any, carry: Any, *, masked: bool) -> Any:
            slots = tuple(_slot(static, 2 * (done + i) + j, index) for j in range(2))
            rings = (q_smem, ring, full, empty, slots)
            if converted:
                return fp8_tile_step(static, item, item.first + i, carry, converted, *rings, masked=masked)
            return tile_step(static, item, item.first + i, carry, *rings, masked=masked)

        unmasked = jnp.int32(0)
        carry = start(static, item, sinks)
        if static.skips_masks:
            seen = seen_by_first_token(static, item) - item.first_cell * tiles.cell
            whole_tiles = seen // tiles.tile_keys
            unmasked = jnp.clip(whole_tiles - item.first, 0, item.count)
            carry = lax.fori_loop(0, unmasked, functools.partial(step, masked=False), carry)
        accumulator, maximum, total = lax.fori_loop(unmasked, item.count, functools.partial(step, masked=True), carry)
        accumulator = accumulator / over_columns(total, accumulator.shape)

        writes_output = item.whole
        slot = 2 * stream + jnp.where(item.first == 0, 1, 0)
        if tiles.sharing > 1:
            has_prefix = item.first_cell > 0
            writes_output = writes_output & jnp.logical_not(has_prefix | is_prefix(item))
            slot = jnp.where(item.whole, slot_of_whole(static.config, tiles, item.row, item.group), slot)

        @pl.when(writes_output)
        def _finished():
            plgpu.commit_smem()  # every warp is done with the queries
            q_smem[...] = accumulator.astype(q_smem.dtype)
            plgpu.commit_smem()
            for i in range(tokens):
                source = q_smem.at[pl.ds(i * tiles.token_rows, tiles.token_rows)]
                target = out.at[jnp.minimum(first_token(static, item) + i, out.shape[0] - 1), item.group]
                write = functools.partial(plgpu.copy_smem_to_gmem, source, target)
                pl.when(i < item.q_len)(write) if tokens > 1 else write()
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(jnp.logical_not(writes_output))
        def _piece():
            lse[slot] = maximum + jnp.log2(total)
            width = min(static.config.staged, static.shape.head_dim)
            for column in range(0, static.shape.head_dim, width):

                def write(num_tokens: int, column: int = column) -> None:
                    rows, columns = pl.ds(0, num_tokens * tiles.token_rows), pl.ds(column, width)
                    plgpu.copy_smem_to_gmem(staged.at[rows], partial.at[slot, rows, columns])

                staged[...] = accumulator[:, column : column + width]
                plgpu.commit_smem()
                if tiles.sharing == 1:
                    write(tokens)
                else:
                    shares = is_prefix(item)
                    pl.when(shares)(functools.partial(write, tiles.sharing))
                    pl.when(jnp.logical_not(shares))(functools.partial(write, 1))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    _for_each_item(static, stream, streams, seqs, attend)
