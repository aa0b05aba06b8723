"""A histogram in shared memory: integer weights, so that the order of the atomic additions does not matter."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mosaic import load
from pallas_kernels.sampling_truncation.cta import (
    LANE_LAYOUT,
    SCALAR_LAYOUT,
    Cta,
    elements,
    ptx,
    splat,
)

GROUPS = 4
"""Bins for each thread of the CTA."""
_ADD = """{
.reg .pred wanted;
.reg .u32 place;
setp.ge.s32 wanted, $1, 0;
shl.b32 place, $1, 2;
add.u32 place, place, $0;
@wanted red.shared.add.u32 [place], $2;
}"""


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Bins 0 to GROUPS * threads - 1; bin b belongs to thread b % threads."""

    values: Any
    """i32[warpgroups, GROUPS, threads] in shared memory: each warpgroup adds to its own copy."""
    cta: Cta

    @property
    def bins(self) -> int:
        return GROUPS * self.cta.threads

    @property
    def numbers(self) -> list[jax.Array]:
        """The thread's bins: a list of i32[THREADS]."""
        return [self.cta.thread + group * self.cta.threads for group in range(GROUPS)]

    def start(self) -> None:
        """Empties all bins. A reduction or `Cta.join` must follow before the first `add`."""
        self._empty()

    def add(self, bins: jax.Array, weights: jax.Array) -> None:
        """Adds i32[THREADS] weights to bins; bin -1 takes nothing."""
        if self.cta.interpret:
            held = self.values[self.cta.index]
            place = jnp.arange(self.bins, dtype=jnp.int32).reshape(held.shape)
            hits = place[..., None] == bins
            self.values[self.cta.index] = held + jnp.sum(jnp.where(hits, weights, 0), -1, dtype=jnp.int32)
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LANE_LAYOUT, LANE_LAYOUT, SCALAR_LAYOUT))
        def added(_: Any, values: Any, bins: Any, weights: Any, warpgroup: Any) -> None:
            i32 = ir.IntegerType.get_signless(32)
            first = llvm.ptrtoint(i32, mgpu_utils.memref_ptr(values))
            copy = arith.muli(warpgroup.registers.item(), mgpu_utils.c(4 * self.bins, i32))
            ((place,), (weight,)) = (elements(x.registers.item()) for x in (bins, weights))
            ptx(_ADD, arith.addi(first, copy), place, weight, result_types=None, has_side_effects=True)

        added(self.values, bins, weights, self.cta.index)  # pyright: ignore[reportCallIssue]

    def take(self) -> list[jax.Array]:
        """The sums of the thread's bins, which are empty afterwards (for `add`: after the next reduction)."""
        self.cta.join()
        totals = []
        for group in range(GROUPS):
            parts = [
                load(self.values.at[copy, group, self.cta.columns], LANE_LAYOUT) for copy in range(self.cta.warpgroups)
            ]
            totals.append(sum(parts[1:], parts[0]))
        self._empty()
        return totals

    def _empty(self) -> None:
        for copy in range(self.cta.warpgroups):
            for group in range(GROUPS):
                self.values[copy, group, self.cta.columns] = splat(0, dtype=jnp.int32)
