"""The producer warpgroup of the prefill kernel on an fp8 cache: e4m3 tiles arrive by TMA, it hands on f16 tiles.

While it converts the keys of a tile, its values arrive, and the next tile's keys while it converts those.
"""

from __future__ import annotations

from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention import mosaic_fp8
from pallas_kernels.ragged_paged_attention.mosaic_prefill_common import Cta, Item
from pallas_kernels.ragged_paged_attention.mosaic_prefill_producer import drain, fetcher, load_queries

_KEYS, _VALUES = 0, 1  # of Cta.fp8_smem


def produce_fp8(cta: Cta) -> None:
    """Runs through the items of the CTA."""
    items = cta.num_items()

    def one_item(index: Any, filled: Any) -> Any:
        item = cta.item(index)

        def one_tile(step: Any, _: Any) -> None:
            pl.when(step == 0)(lambda: plgpu.warp_map(lambda warp: load_queries(cta, item, index, warp)))
            for which in (_KEYS, _VALUES):
                _convert_tile(cta, item, step, filled + step, which)
                _fetch_next(cta, item, index, step, items, which)

        lax.fori_loop(0, item.steps, one_tile, None)
        return filled + item.steps

    @pl.when(items > 0)
    def _():
        for which in (_KEYS, _VALUES):
            _fetch(cta, cta.item(0), 0, which)

    filled = lax.fori_loop(0, items, one_item, jnp.int32(0))
    plgpu.warp_map(lambda warp: drain(cta, items, filled, warp))


def _fetch(cta: Cta, item: Item, step: Any, which: int) -> None:
    base = (item.last - step) * cta.config.tile_keys
    gmem = (cta.k_gmem, cta.v_gmem)[which]

    def one_warp(warp: Any) -> None:
        fetcher(cta, item, base, warp)(gmem, cta.fp8_smem.at[which], cta.fp8_full.at[which])

    plgpu.warp_map(one_warp)


def _fetch_next(cta: Cta, item: Item, index: Any, step: Any, items: Any, which: int) -> None:
    """Fetches the tile after this one: of this item, or the first one of the CTA's next item."""
    inside = step + 1 < item.steps
    pl.when(inside)(lambda: _fetch(cta, item, step + 1, which))
    pl.when(jnp.logical_not(inside) & (index + 1 < items))(lambda: _fetch(cta, cta.item(index + 1), 0, which))


def _convert_tile(cta: Cta, item: Item, step: Any, count: Any, which: int) -> None:
    """Hands on the keys or values of the step-th key tile of an item; `count` tiles came before."""
    config, slot = cta.config, cta.slot(count)
    base = (item.last - step) * config.tile_keys
    free = (cta.k_free, cta.v_free)[which](slot)
    source, target = cta.fp8_smem.at[which], (cta.k_smem, cta.v_smem)[which].at[slot]

    def convert(keys: mosaic_fp8.Keys | None) -> None:
        mosaic_fp8.convert(source, target, keys=keys, interpret=cta.problem.interpret)

    plgpu.barrier_wait(cta.fp8_full.at[which])
    pl.when(count >= config.stages)(lambda: plgpu.barrier_wait(free))
    if which == _KEYS:
        convert(None)
    else:  # an unwritten slot may hold NaN
        unused = (base + config.tile_keys > item.end) | (base < item.begin)
        seen = mosaic_fp8.Keys(item.begin - base, item.end - base, config.tile_keys, config.tile_keys)
        pl.when(unused)(lambda: convert(seen))
        pl.when(jnp.logical_not(unused))(lambda: convert(None))
    plgpu.commit_smem()
    plgpu.barrier_arrive((cta.k_full, cta.v_full)[which](slot))
