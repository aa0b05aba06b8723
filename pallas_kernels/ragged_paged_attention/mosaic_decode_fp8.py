"""One tile of the decode attention kernel on an fp8 cache: e4m3 tiles of the ring become f16 tiles.

At 32/8 heads and head dim 128 a tile of 128 columns is 32 KB of the cache, 1 us of an SM's memory, and 208 KB through
shared memory (arrival, conversion there and back, operands of wgmma), 0.9 us of it: that is the next limit.
"""

from __future__ import annotations

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention import mosaic_fp8
from pallas_kernels.ragged_paged_attention.mosaic_decode_tile import (
    Carry,
    Item,
    Kernel,
    add_product,
    mask,
    scores_of,
    softmax,
    tile_first_key,
    visible_keys,
)


def fp8_tile_step(
    static: Kernel,
    item: Item,
    tile: Any,
    carry: Carry,
    converted: tuple[Any, ...],
    q_smem: Any,
    ring: Any,
    full: Any,
    empty: Any,
    slots: tuple[Any, Any],
    *,
    masked: bool,
) -> Carry:
    """Like tile_step; `converted` are one f16 tile for K and V in turns, or one for each.

    A converted tile may be overwritten when every warp has read it. With two tiles the barrier behind the other one's
    conversion says so; with one it takes a barrier more.
    """
    k_slot, v_slot = slots
    k_smem, v_smem, alone = converted[0], converted[-1], len(converted) == 1

    def convert(slot: Any, target: Any, keys: mosaic_fp8.Keys | None = None) -> None:
        plgpu.barrier_wait(full.at[slot])
        mosaic_fp8.convert(ring.at[slot], target, keys=keys, interpret=static.interpret)
        plgpu.barrier_arrive(empty.at[slot])
        plgpu.commit_smem()

    if alone:
        plgpu.commit_smem()
    convert(k_slot, k_smem)
    overlap = not (alone or masked)
    scores = scores_of(static, q_smem, k_smem, (lambda: convert(v_slot, v_smem)) if overlap else None)
    first_key = tile_first_key(static, item, tile)
    carry, weights = softmax(carry, mask(static, item, first_key, scores, masked=masked))
    accumulator, maximum, total = carry
    weights = weights.astype(q_smem.dtype)
    if alone:
        plgpu.commit_smem()
    if not overlap:
        convert(v_slot, v_smem, _visible(static, item, first_key) if masked else None)
    return add_product(static, accumulator, weights, v_smem), maximum, total


def _visible(static: Kernel, item: Item, first_key: Any) -> mosaic_fp8.Keys:
    """The rows of a tile whose keys some row of the item sees; an unwritten slot may hold NaN."""
    begin, end = visible_keys(static, item)
    return mosaic_fp8.Keys(begin - first_key, end - first_key, static.tiles.box_rows, static.tiles.cell)
