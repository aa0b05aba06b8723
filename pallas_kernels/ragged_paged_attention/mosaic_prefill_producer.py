"""The producer warpgroup of the prefill kernel: keys, values and queries into shared memory.

Each of its four warps brings a quarter of every tile, one TMA per block of the block table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import load
from pallas_kernels.ragged_paged_attention.mosaic_prefill_common import WARPS, Cta, Item

_ZERO_SHAPE = (64, 64)  # values rewritten at a time, to spare registers


def produce(cta: Cta) -> None:
    """Runs through the items of the CTA."""

    def one_item(index: Any, filled: Any) -> Any:
        item = cta.item(index)

        def one_tile(step: Any, _: Any) -> None:
            _load_tile(cta, item, index, step, filled + step)

        lax.fori_loop(0, item.steps, one_tile, None)
        return filled + item.steps

    items = cta.num_items()
    filled = lax.fori_loop(0, items, one_item, jnp.int32(0))
    plgpu.warp_map(lambda warp: drain(cta, items, filled, warp))


def drain(cta: Cta, items: Any, filled: Any, warp: Any) -> None:
    """Waits until all that was loaded has been used."""

    def one_slot(slot: Any, _: Any) -> None:
        plgpu.barrier_wait(cta.k_free(slot))
        plgpu.barrier_wait(cta.v_free(slot))

    lax.fori_loop(0, jnp.minimum(filled, cta.config.stages), one_slot, None)
    pl.when((items > 0) & (warp < cta.config.warpgroups))(lambda: plgpu.barrier_wait(cta.q_free.at[warp]))


def _load_tile(cta: Cta, item: Item, index: Any, step: Any, count: Any) -> None:
    """Loads the step-th key tile of an item and with the first one the queries; `count` tiles came before."""
    config = cta.config
    slot, base = cta.slot(count), (item.last - step) * config.tile_keys
    unused = (base + config.tile_keys > item.end) | (base < item.begin)
    v_barrier = cta.kv_full.at[jnp.where(unused, 2 * config.stages, slot + config.stages)]

    def one_warp(warp: Any) -> None:
        fetch = fetcher(cta, item, base, warp)

        @pl.when(count >= config.stages)
        def _():
            plgpu.barrier_wait(cta.k_free(slot))

        fetch(cta.k_gmem, cta.k_smem.at[slot], cta.k_full(slot))
        pl.when(step == 0)(lambda: load_queries(cta, item, index, warp))

        @pl.when(count >= config.stages)
        def _():
            plgpu.barrier_wait(cta.v_free(slot))

        fetch(cta.v_gmem, cta.v_smem.at[slot], v_barrier)

    plgpu.warp_map(one_warp)
    pl.when(unused)(lambda: _zero_unused_values(cta, item, slot, base))


def fetcher(cta: Cta, item: Item, base: Any, warp: Any) -> Callable[[Any, Any, Any], None]:
    """fetch(cache, tile in shared memory, barrier) for this warp's quarter of the tile of keys from `base` on."""
    config, problem = cta.config, cta.problem
    keys, per_warp = config.copy_keys(problem.block_size), config.copies(problem.block_size) // WARPS
    kv_head = lax.div(item.head, jnp.int32(problem.group))
    rows = [(warp * per_warp + j) * keys for j in range(per_warp)]
    columns = [lax.div(base + row, jnp.int32(problem.block_size)) for row in rows]
    blocks = [cta.tables[item.table_row, jnp.minimum(c, cta.tables.shape[1] - 1)] for c in columns]

    def fetch(gmem: Any, tile: Any, barrier: Any) -> None:
        for row, block in zip(rows, blocks, strict=True):
            offset = 0
            if keys < problem.block_size:
                part = lax.rem(lax.div(base + row, jnp.int32(keys)), jnp.int32(problem.block_size // keys))
                offset = part * keys  # a product: Mosaic must see the alignment
            source = gmem.at[block, kv_head, pl.ds(offset, keys)]
            plgpu.copy_gmem_to_smem(source, tile.at[pl.ds(row, keys)], barrier)

    return fetch


def load_queries(cta: Cta, item: Item, index: Any, warp: Any) -> None:
    """Warp w loads the rows of the compute warpgroup w."""
    rows = cta.config.segment_rows

    @pl.when(warp < cta.config.warpgroups)
    def _():
        pl.when(index > 0)(lambda: plgpu.barrier_wait(cta.q_free.at[warp]))
        for segment in range(cta.config.segments):
            token, head = cta.segment(item, warp, segment)
            source = cta.q_gmem.at[pl.ds(token, rows), head]
            plgpu.copy_gmem_to_smem(source, cta.q_smem.at[warp, pl.ds(segment * rows, rows)], cta.q_full.at[warp])


def _zero_unused_values(cta: Cta, item: Item, slot: Any, base: Any) -> None:
    """Zeroes the values outside [begin, end): their weight is 0, but an unwritten slot may hold NaN."""
    plgpu.barrier_wait(cta.v_unfinished)
    height, width = _ZERO_SHAPE
    columns = cta.problem.head_dim // width

    def one_part(index: Any, _: Any) -> None:
        row, column = lax.div(index, jnp.int32(columns)) * height, lax.rem(index, jnp.int32(columns)) * width
        key = base + row + plgpu.broadcasted_iota(jnp.int32, _ZERO_SHAPE, 0, layout=plgpu.Layout.WGMMA)
        part = cta.v_smem.at[slot, pl.ds(row, height), pl.ds(column, width)]
        values = load(part, plgpu.Layout.WGMMA)
        part[...] = jnp.where((key >= item.begin) & (key < item.end), values, jnp.zeros_like(values))

    lax.fori_loop(0, cta.config.tile_keys // height * columns, one_part, None)
    plgpu.commit_smem()
    for _ in range(cta.config.copies(cta.problem.block_size)):
        plgpu.barrier_arrive(cta.v_full(slot))
