"""The work of a scan on the values that its threads hold: sums above four bounds, and candidates to shared memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.sampling_truncation.cta import (
    LANE_LAYOUT,
    SCALAR_LAYOUT,
    THREADS,
    VECTOR_LAYOUT,
    Cta,
    elements,
    lanes,
    ptx,
    splat,
)

FLOOR, TOP, BOTH = "floor", "top", "both"
"""What a scan is for: without FLOOR there are no counts and no candidates of the floor's bracket, without TOP no masses
and no candidates of the other."""

_LOG2E = math.log2(math.e)
# One value. Results: $0 the place of the next candidate, $1 to $6 the fields of Tally after `counts`; $7 to $13 are
# the same before it. $14 the value, $15 to $18 the fields of Brackets, $19 the reference, $20 the end of the places,
# $21 their distance. A thread's candidates beyond the end are counted and dropped.
_DECLARED = """
.reg .pred low, high, below, top_low, top_high, kept, fits;
.reg .b32 place;
.reg .f32 mass, largest, count_low, count_high, mass_high, mass_top_low, mass_top_high;
max.f32 largest, $8, $14;
mov.f32 count_low, $9;
mov.f32 count_high, $10;
mov.f32 mass_high, $11;
mov.f32 mass_top_low, $12;
mov.f32 mass_top_high, $13;
setp.ge.f32 high, $14, $16;
"""
_FLOOR = """
setp.ge.f32 low, $14, $15;
not.pred below, high;
and.pred kept, low, below;
@low add.f32 count_low, count_low, 0f3F800000;
@high add.f32 count_high, count_high, 0f3F800000;
"""
_TOP = """
setp.ge.f32 top_low, $14, $17;
setp.ge.f32 top_high, $14, $18;
not.pred below, top_high;
sub.f32 mass, $14, $19;
mul.f32 mass, mass, 0f3FB8AA3B;
ex2.approx.ftz.f32 mass, mass;
@high add.f32 mass_high, mass_high, mass;
@top_low add.f32 mass_top_low, mass_top_low, mass;
@top_high add.f32 mass_top_high, mass_top_high, mass;
"""
_TOP_ONLY = "and.pred kept, top_low, below;"
_TOP_TOO = "and.pred below, top_low, below;\nor.pred kept, kept, below;"
_STORED = """
setp.lt.and.u32 fits, $7, $20, kept;
@fits st.shared.f32 [$7], $14;
mov.b32 place, $7;
@kept add.u32 place, place, $21;
mov.b32 $0, place;
mov.f32 $1, largest;
mov.f32 $2, count_low;
mov.f32 $3, count_high;
mov.f32 $4, mass_high;
mov.f32 $5, mass_top_low;
mov.f32 $6, mass_top_high;
"""
_VISIT = {
    FLOOR: f"{{{_DECLARED}{_FLOOR}{_STORED}}}",
    TOP: f"{{{_DECLARED}{_TOP}{_TOP_ONLY}{_STORED}}}",
    BOTH: f"{{{_DECLARED}{_FLOOR}{_TOP}{_TOP_TOO}{_STORED}}}",
}


class Brackets(NamedTuple):
    """Where a scan looks: for the floor (the threshold of top-k and min-p) and, not below, for that of top-p.

    Values in [floor_low, floor_high) and in [top_low, top_high) are candidates; floor_high <= top_low.
    """

    floor_low: jax.Array
    floor_high: jax.Array
    top_low: jax.Array
    top_high: jax.Array


class Tally(NamedTuple):
    """What a thread has seen, [THREADS]: i32 candidates, the largest value, numbers and masses from a bound on."""

    counts: jax.Array
    largest: jax.Array
    count_low: jax.Array
    count_high: jax.Array
    """From floor_low, floor_high."""
    mass_high: jax.Array
    mass_top_low: jax.Array
    mass_top_high: jax.Array
    """From floor_high, top_low, top_high."""

    @classmethod
    def empty(cls) -> Tally:
        return cls(splat(0, dtype=jnp.int32), splat(-jnp.inf), *[splat(0.0)] * 5)


def weight(values: jax.Array, reference: Any) -> jax.Array:
    """exp(values - reference)."""
    return jnp.exp2((values - reference) * _LOG2E)


def visit(
    cta: Cta,
    pool: Any,
    tally: Tally,
    vectors: Sequence[jax.Array],
    brackets: Brackets,
    reference: jax.Array,
    purpose: str,
) -> Tally:
    """Adds f32[VECTOR] arrays to the tally, and their candidates to the threads' columns of `pool`.

    pool: f32[slots, threads] in shared memory. Masses are relative to exp(reference).
    """
    if cta.interpret:
        for values in vectors:
            for part in values.reshape(THREADS, -1).T:
                tally = _plain_visit(cta, pool, tally, part, brackets, reference, purpose)
        return tally
    slots, threads = pool.shape
    float_lanes = plgpu.ShapeDtypeStruct((THREADS,), jnp.float32, layout=LANE_LAYOUT)
    count_lanes = plgpu.ShapeDtypeStruct((THREADS,), jnp.int32, layout=LANE_LAYOUT)
    fields = len(Tally._fields)

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(),
            SCALAR_LAYOUT,
            *[LANE_LAYOUT] * fields,
            *[SCALAR_LAYOUT] * 5,
            *[VECTOR_LAYOUT] * len(vectors),
        ),
        return_type=(count_lanes, *[float_lanes] * (fields - 1)),
    )
    def visited(_: Any, pool: Any, warpgroup: Any, *arguments: Any) -> tuple[mgpu.FragmentedArray, ...]:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        constant = lambda value: mgpu_utils.c(value, i32)  # noqa: E731
        count, *state = (elements(x.registers.item())[0] for x in arguments[:fields])
        scalars = [x.registers.item() for x in arguments[fields : fields + 5]]
        lane = arith.remui(mgpu_utils.thread_idx(), constant(THREADS))
        column = arith.addi(arith.muli(warpgroup.registers.item(), constant(THREADS)), lane)
        first = llvm.ptrtoint(i32, mgpu_utils.memref_ptr(pool))
        first = arith.addi(first, arith.muli(column, constant(4)))
        end, distance = arith.addi(first, constant(4 * slots * threads)), constant(4 * threads)
        place = arith.addi(first, arith.muli(count, distance))
        for array in arguments[fields + 5 :]:
            for register in array.registers.flat:
                for value in elements(register):
                    place, *state = ptx(
                        _VISIT[purpose],
                        *(place, *state, value, *scalars, end, distance),
                        result_types=[i32, *[f32] * (fields - 1)],
                        has_side_effects=True,
                    )
        count = arith.divui(arith.subi(place, first), distance)
        return lanes(count, is_signed=True), *(lanes(x) for x in state)

    found: Any = visited(pool, cta.index, *tally, *brackets, reference, *vectors)
    return Tally(*found)


def _plain_visit(
    cta: Cta, pool: Any, tally: Tally, values: jax.Array, brackets: Brackets, reference: jax.Array, purpose: str
) -> Tally:
    """`visit` of one f32[THREADS] for the interpreter."""
    low, high, top_low, top_high = (values >= bound for bound in brackets)
    floor, top = purpose != TOP, purpose != FLOOR
    kept = (low & ~high & floor) | (top_low & ~top_high & top)
    held = pool[:, cta.columns]
    row = jnp.arange(pool.shape[0], dtype=jnp.int32)[:, None]
    pool[:, cta.columns] = jnp.where((row == tally.counts) & kept, values, held)
    mass = weight(values, reference)
    return Tally(
        tally.counts + kept.astype(jnp.int32),
        lax.max(tally.largest, values),
        tally.count_low + jnp.where(low & floor, 1.0, 0.0),
        tally.count_high + jnp.where(high & floor, 1.0, 0.0),
        tally.mass_high + jnp.where(high & top, mass, 0.0),
        tally.mass_top_low + jnp.where(top_low & top, mass, 0.0),
        tally.mass_top_high + jnp.where(top_high & top, mass, 0.0),
    )
