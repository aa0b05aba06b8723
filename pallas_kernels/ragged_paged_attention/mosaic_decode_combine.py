"""Second kernel of the decode attention: combines the pieces of items that several streams worked on."""

from __future__ import annotations

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
    """Writes the rows of split items into the ref `out` [T, groups, token_rows, D].

    Args:
        plan: The step's plan.
        tiles: tiling(plan.config, plan.shape).
        partial: f32[2 * num_streams, rows, D], normalised outputs of the pieces.
        lse: f32[2 * num_streams, 64], log2 of their weights.
        out: Ref that already has the items that were not split.
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
    first, count, item_row, token = (pieces[place, group, column] for column in Piece)
    target = out.at[token, group, pl.ds(row, _ROWS)]
    inside = row < tiles.token_rows

    if zero_padding:

        @pl.when(inside & (count < 0))
        def _zero():
            target[...] = plgpu.layout_cast(jnp.zeros((_ROWS, out.shape[-1]), out.dtype), layout(out.shape[-1]))

    @pl.when(inside & (count > 1))
    def _split():
        result = _weighted_mean(unroll, first, count, item_row + row, partial, lse)
        target[...] = result.astype(out.dtype)


def _weighted_mean(unroll: int, first: Any, count: Any, row: Any, partial: Any, lse: Any) -> jax.Array:
    """f32[4, D]: rows [row, row + 4) of an item, from its pieces. The first piece is the second one of its stream."""
    head_dim = partial.shape[-1]
    full = layout(head_dim)
    rows = full.reduce(1)

    def step(i: Any, carry: Any) -> Any:
        total, weight, maximum = carry
        values, logs = [], []
        for j in range(unroll):
            piece = i * unroll + j
            index = jnp.minimum(piece, count - 1)
            slot = 2 * (first + index) + jnp.where(index == 0, 1, 0)
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
