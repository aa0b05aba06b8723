"""How a compute warpgroup of the prefill kernel writes its rows: staged in shared memory, stored by TMA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention import mosaic_inline as inline
from pallas_kernels.ragged_paged_attention.mosaic_prefill_common import (
    OUTPUT_COLUMNS,
    OUTPUT_TRANSFORMS,
    Cta,
    Item,
)


def store_rows(cta: Cta, warpgroup: Any, item: Item, result: jax.Array) -> None:
    """Writes the rows of `result` f32[64, D] that belong to the item's tokens [skip, stop), and no others."""
    rows, staged = cta.config.segment_rows, cta.o_smem.at[warpgroup]
    for column in range(0, cta.problem.head_dim, OUTPUT_COLUMNS):
        width = min(OUTPUT_COLUMNS, cta.problem.head_dim - column)
        part = result[:, column : column + width].astype(staged.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if cta.problem.interpret:
            staged[...] = part
        else:
            inline.stage_rows(part, staged, OUTPUT_TRANSFORMS)
        plgpu.commit_smem()
        for segment in range(cta.config.segments):
            token, head = cta.segment(item, warpgroup, segment)
            offset = token - item.start
            first, stop = jnp.maximum(item.skip - offset, 0), jnp.minimum(item.stop - offset, rows)
            output = cta.output.at[:, head, pl.ds(column, width)]
            _store_segment(staged.at[pl.ds(segment * rows, rows)], output, rows, first, stop, token)


def _store_segment(staged: Any, output: Any, rows: int, first: Any, stop: Any, token: Any) -> None:
    """Rows [first, stop) of a segment whose row 0 is `token`: all at once, or by eights and then one by one."""

    def copy(row: Any, count: int) -> None:
        plgpu.copy_smem_to_gmem(staged.at[pl.ds(row, count)], output.at[pl.ds(token + row, count)])

    whole = (first == 0) & (stop == rows)
    pl.when(whole)(lambda: copy(0, rows))

    @pl.when(~whole)
    def _():
        eights = lax.div(jnp.maximum(stop - first, 0), jnp.int32(8))
        lax.fori_loop(0, eights, lambda i, _: copy(first + i * 8, 8), None)
        lax.fori_loop(first + eights * 8, stop, lambda row, _: copy(row, 1), None)
