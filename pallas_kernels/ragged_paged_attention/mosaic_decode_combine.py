"""Second kernel of the decode attention: combines the pieces of items that several streams worked on, and those of an
item and its prefix."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import interpret_params, load, over_columns
from pallas_kernels.ragged_paged_attention.plan_decode import DecodePlan, Piece, Tiling

_ROWS = 4  # of a warpgroup: one for each warp
_MAX_WARPGROUPS = 4
_NOTHING = -2e30  # log of the weight of a piece that is not there; below that of a piece that sees nothing


def layout(head_dim: int) -> Any:
    """Of [4, head_dim]: a warp has a row, a lane neighbouring columns of it."""
    width = min(head_dim, 128)
    tiles = plgpu.Tiling(((_ROWS, width), (width // 32,)))
    return plgpu.Layout.TILED(tiles, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def combine(
    plan: DecodePlan,
    tiles: Tiling,
    partial: jax.Array,
    lse: jax.Array,
    out: Any,
    *,
    zero_padding: bool,
    interpret: bool,
) -> None:
    """Writes the rows of items in pieces into the ref `out` [T, groups, token_rows, D].

    Args:
        plan: The step's plan.
        tiles: tiling(plan.config, plan.shape).
        partial: f32[num_slots, rows, D], normalised outputs of the pieces.
        lse: f32[num_slots, 64], log2 of their weights.
        out: Ref that already has the other items.
        zero_padding: Write zeros for tokens of no sequence.
        interpret: Run by the CPU interpreter.
    """
    warpgroups = min(tiles.token_rows // _ROWS, _MAX_WARPGROUPS)
    chunks = -(-tiles.token_rows // (_ROWS * warpgroups))
    launch = plgpu.kernel(
        functools.partial(_kernel, plan.config.unroll, tiles, warpgroups, zero_padding),
        out_type=(),
        grid=(tiles.groups, chunks, plan.pieces.shape[0]),
        grid_names=("group", "chunk", "place"),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            unsafe_no_auto_barriers=not interpret,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret_params(interpret),
        kernel_name="combine_decode_attention",
    )
    launch(plan.pieces, partial, lse, out)


def _kernel(unroll: int, tiles: Tiling, warpgroups: int, zero_padding: bool, pieces, partial, lse, out) -> None:
    place, group = lax.axis_index("place"), lax.axis_index("group")
    row = (lax.axis_index("chunk") * warpgroups + lax.axis_index("wg")) * _ROWS
    slot, count, item_row, token, *prefix = (pieces[place, group, column] for column in Piece)
    own, prefixed = _Pieces(slot, count, item_row + row), None
    is_split = count > 1
    if tiles.sharing > 1:
        prefixed = _Pieces(prefix[0], prefix[1], prefix[2] + row)
        is_split = is_split | ((count > 0) & (prefixed.count > 0))
    target = out.at[token, group, pl.ds(row, _ROWS)]
    inside = row < tiles.token_rows

    if zero_padding:

        @pl.when(inside & (count < 0))
        def _zero():
            target[...] = plgpu.layout_cast(jnp.zeros((_ROWS, out.shape[-1]), out.dtype), layout(out.shape[-1]))

    @pl.when(inside & is_split)
    def _split():
        result = _weighted_mean(unroll, own, prefixed, partial, lse)
        target[...] = result.astype(out.dtype)


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """Of an item: slot of the first one, how many there are, and the first of the rows wanted. Traced scalars."""

    slot: Any
    count: Any
    row: Any

    def slot_of(self, index: Any) -> Any:
        """A stream's slots are 2 i and 2 i + 1: an item's first piece is the last of its stream, the others the first
        of theirs."""
        return self.slot + jnp.where(index == 0, 0, 2 * index - 1)


def _weighted_mean(unroll: int, own: _Pieces, prefix: _Pieces | None, partial: Any, lse: Any) -> jax.Array:
    """f32[4, D]: four rows of an item, from its pieces and those of its prefix."""
    head_dim = partial.shape[-1]
    full = layout(head_dim)
    rows = full.reduce(1)
    count = own.count if prefix is None else own.count + prefix.count

    def place(index: Any) -> tuple[Any, Any]:
        """Slot and first row of a piece."""
        if prefix is None:
            return own.slot_of(index), own.row
        of_prefix = index >= own.count
        slot = jnp.where(of_prefix, prefix.slot_of(index - own.count), own.slot_of(index))
        return slot, jnp.where(of_prefix, prefix.row, own.row)

    def step(i: Any, carry: Any) -> Any:
        total, weight, maximum = carry
        values, logs = [], []
        for j in range(unroll):
            piece = i * unroll + j
            slot, row = place(jnp.minimum(piece, count - 1))
            values.append(load(partial.at[slot, pl.ds(row, _ROWS)], full))
            log = load(lse.at[slot, pl.ds(row, _ROWS)], rows)
            logs.append(log + jnp.where(piece < count, 0.0, _NOTHING))
        new_maximum = functools.reduce(jnp.maximum, logs, maximum)
        correction = jnp.exp2(maximum - new_maximum)
        total, weight = total * over_columns(correction, total.shape, full), weight * correction
        for value, log in zip(values, logs, strict=True):
            share = jnp.exp2(log - new_maximum)
            total = total + value * over_columns(share, total.shape, full)
            weight = weight + share
        return total, weight, new_maximum

    carry = (
        plgpu.layout_cast(jnp.zeros((_ROWS, head_dim), jnp.float32), full),
        plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), rows),
        plgpu.layout_cast(jnp.full((_ROWS,), _NOTHING, jnp.float32), rows),
    )
    total, weight, _ = lax.fori_loop(0, (count + (unroll - 1)) // unroll, step, carry)
    return total / over_columns(weight, total.shape, full)
