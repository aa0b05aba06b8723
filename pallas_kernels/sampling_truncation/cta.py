"""A CTA of several warpgroups that works on one row: layouts, reductions over all of its threads, compaction.

Mosaic GPU's own reductions give all warpgroups of a CTA the same scratch memory, so two of them must not reduce at the
same time; these use shuffles within a warp and a buffer with a place for each warp. Two steps have no Pallas primitive
and are written in the lower level, with a plain equivalent for the interpreter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

THREADS = 128
"""Threads of a warpgroup."""
WARP = 32
VECTOR = 4 * THREADS
"""Elements of one 16-byte load by every thread of a warpgroup."""
MAX_REDUCED = 8
"""Most values that one `Cta.reduce` takes."""

LANE_LAYOUT = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)
VECTOR_LAYOUT = plgpu.Layout.WG_STRIDED((VECTOR,), vec_size=4)

ADD, MAX, MIN = "add", "max", "min"
_COMBINE = {ADD: lax.add, MAX: lax.max, MIN: lax.min}
_APPEND = """{
.reg .pred wanted, fits;
setp.ge.f32 wanted, $2, $3;
setp.lt.and.f32 wanted, $2, $4, wanted;
setp.lt.and.u32 fits, $1, $5, wanted;
@fits st.shared.f32 [$1], $2;
mov.b32 $0, $1;
@wanted add.u32 $0, $0, $6;
}"""
"""Stores $2 at $1 if it lies in [$3, $4) and $1 is below $5. The next address is one row of $6 bytes on if it does."""
_PTX = {ADD: "add.f32", MAX: "max.f32", MIN: "min.f32"}


def splat(value: Any, size: int = THREADS, dtype: Any = jnp.float32) -> jax.Array:
    """An array of `size` (THREADS or VECTOR) equal elements."""
    layout = LANE_LAYOUT if size == THREADS else VECTOR_LAYOUT
    return plgpu.layout_cast(jnp.full((size,), value, dtype), layout)


class Pool(NamedTuple):
    """Values of the row in shared memory: thread t owns column t, of which the first counts[t] rows are used."""

    values: Any
    """f32[rows, columns] reference."""
    counts: jax.Array
    """i32[THREADS]: of this warpgroup's threads. May exceed the rows: then values were dropped."""
    used_rows: jax.Array
    """i32: the largest count of the CTA, at most the number of rows."""


@dataclasses.dataclass(frozen=True)
class Cta:
    """The warpgroup's view of its CTA. All warpgroups must call `reduce` equally often."""

    index: jax.Array
    warpgroups: int
    partials: Any
    """f32[MAX_REDUCED, warpgroups * THREADS] in shared memory."""
    written: Any
    read: Any
    """Barriers with one arrival from each warpgroup."""
    interpret: bool

    @property
    def columns(self) -> Any:
        """The columns of a pool that belong to this warpgroup."""
        return plgpu_ds(self.index * THREADS, THREADS)

    def start(self) -> None:
        """Before the first reduction."""
        plgpu.barrier_arrive(self.read)

    def finish(self) -> None:
        """After the last reduction."""
        plgpu.barrier_wait(self.read)

    def reduce(self, values: Sequence[jax.Array], kinds: Sequence[str]) -> list[jax.Array]:
        """Scalars: each f32[THREADS] or f32[VECTOR] of all warpgroups reduced, in an order that does not vary."""
        assert len(values) <= MAX_REDUCED
        by_warp = [self._warp_reduce(value, kind) for value, kind in zip(values, kinds, strict=True)]
        plgpu.barrier_wait(self.read)
        for i, value in enumerate(by_warp):
            self.partials[i, self.columns] = value
        plgpu.barrier_arrive(self.written)
        plgpu.barrier_wait(self.written)
        results = []
        for i, kind in enumerate(kinds):
            parts = [self.partials[i, start] for start in range(0, self.warpgroups * THREADS, WARP)]
            while len(parts) > 1:
                pairs = zip(parts[::2], parts[1::2], strict=True)
                parts = [_COMBINE[kind](a, b) for a, b in pairs]
            results.append(parts[0])
        plgpu.barrier_arrive(self.read)
        return results

    def _warp_reduce(self, values: jax.Array, kind: str) -> jax.Array:
        """f32[THREADS]: what a thread's warp holds, reduced."""
        if self.interpret:
            warps = values.reshape(THREADS // WARP, -1)
            totals = {ADD: jnp.sum, MAX: jnp.max, MIN: jnp.min}[kind](warps, axis=1, keepdims=True)
            return jnp.broadcast_to(totals, (THREADS // WARP, WARP)).reshape(THREADS)
        layout = LANE_LAYOUT if values.shape[0] == THREADS else VECTOR_LAYOUT
        result = plgpu.ShapeDtypeStruct((THREADS,), jnp.float32, layout=LANE_LAYOUT)

        @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
        def by_warp(_: Any, *arguments: Any) -> mgpu.FragmentedArray:
            (array,) = arguments
            parts = [part for register in array.registers.flat for part in _elements(register)]
            total = parts[0]
            for part in parts[1:]:
                total = _binary(kind, total, part)
            for distance in (16, 8, 4, 2, 1):
                total = _binary(kind, total, mgpu_utils.shfl_bfly(total, distance))
            return _lanes([total])

        return by_warp(values)  # pyright: ignore[reportReturnType]

    def compact(self, pool: Any, counts: jax.Array, values: jax.Array, low: Any, high: Any) -> jax.Array:
        """Appends the values v of f32[VECTOR] with low <= v < high to their threads' columns of a pool's values.

        Returns the new counts; values that find no row are counted and dropped.
        """
        rows, columns = pool.shape
        if self.interpret:
            return _plain_compact(pool, self.columns, counts, values, low, high)
        scalar = plgpu.Layout.WG_SPLAT(())

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), LANE_LAYOUT, VECTOR_LAYOUT, scalar, scalar, scalar),
            return_type=plgpu.ShapeDtypeStruct((THREADS,), jnp.int32, layout=LANE_LAYOUT),
        )
        def appended(_: Any, *arguments: Any) -> mgpu.FragmentedArray:
            pool, counts, values, *scalars = arguments
            i32 = ir.IntegerType.get_signless(32)
            low, high, warpgroup = (x.registers.item() for x in scalars)
            lane = arith.remui(mgpu_utils.thread_idx(), mgpu_utils.c(THREADS, i32))
            column = arith.addi(arith.muli(warpgroup, mgpu_utils.c(THREADS, i32)), lane)
            first = llvm.ptrtoint(i32, mgpu_utils.memref_ptr(pool))
            first = arith.addi(first, arith.muli(column, mgpu_utils.c(4, i32)))
            end = arith.addi(first, mgpu_utils.c(4 * rows * columns, i32))
            row_bytes = mgpu_utils.c(4 * columns, i32)
            (count,) = _elements(counts.registers.item())
            address = arith.addi(first, arith.muli(count, row_bytes))
            for register in values.registers.flat:
                for value in _elements(register):
                    address = mgpu_utils.inline_ptx(  # pyright: ignore[reportAttributeAccessIssue]
                        _APPEND, address, value, low, high, end, row_bytes, result_types=i32, has_side_effects=True
                    )
            return _lanes([arith.divui(arith.subi(address, first), row_bytes)], is_signed=True)

        return appended(pool, counts, values, low, high, self.index)  # pyright: ignore[reportReturnType]


def plgpu_ds(start: Any, size: int) -> Any:
    """A slice that starts at a multiple of its size."""
    from jax.experimental import pallas as pl

    return pl.ds(pl.multiple_of(start, size), size)


def _elements(register: Any) -> list[Any]:
    """The scalars of a register of a FragmentedArray."""
    (size,) = ir.VectorType(register.type).shape
    extract = vector.extract
    return [extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i])) for i in range(size)]


def _lanes(scalars: Sequence[Any], is_signed: bool | None = None) -> mgpu.FragmentedArray:
    """The array in LANE_LAYOUT that holds each thread's scalar."""
    registers = [vector.broadcast(ir.VectorType.get((1,), x.type), x) for x in scalars]
    return mgpu.FragmentedArray(
        _registers=np.array(registers, dtype=object), _layout=LANE_LAYOUT.to_mgpu(), _is_signed=is_signed
    )


def _binary(kind: str, a: Any, b: Any) -> Any:
    return mgpu_utils.inline_ptx(f"{_PTX[kind]} $0, $1, $2;", a, b, result_types=ir.F32Type.get())  # pyright: ignore[reportAttributeAccessIssue]


def _plain_compact(pool: Any, columns: Any, counts: jax.Array, values: jax.Array, low: Any, high: Any) -> jax.Array:
    rows = pool.shape[0]
    held = pool[:, columns]
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    per_thread = values.reshape(THREADS, -1)
    for j in range(math.prod(values.shape) // THREADS):
        value = per_thread[:, j]
        wanted = (value >= low) & (value < high)
        held = jnp.where((row == counts) & wanted, value, held)
        counts = counts + wanted.astype(jnp.int32)
    pool[:, columns] = held
    return counts
