"""A CTA of several warpgroups that works on one row: layouts, reductions and sums over all of its threads.

Mosaic GPU's own reductions give all warpgroups of a CTA the same scratch memory, so two of them must not reduce at the
same time; these use shuffles within a warp and a buffer with a place for each warp. Steps that have no Pallas primitive
are written in the lower level, with a plain equivalent for the interpreter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

THREADS = 128
"""Threads of a warpgroup."""
WARP = 32
VECTOR = 4 * THREADS
"""Elements of one 16-byte load by every thread of a warpgroup."""
MAX_REDUCED = 8
"""Most values of one type that one `Cta.reduce` or `Cta.sums_from` takes."""

LANE_LAYOUT = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)
VECTOR_LAYOUT = plgpu.Layout.WG_STRIDED((VECTOR,), vec_size=4)
SCALAR_LAYOUT = plgpu.Layout.WG_SPLAT(())

ADD, MAX, MIN = "add", "max", "min"
_COMBINE = {ADD: lax.add, MAX: lax.max, MIN: lax.min}
_OF_WARP = {ADD: jnp.sum, MAX: jnp.max, MIN: jnp.min}
_SUFFIX_STEP = """{
.reg .pred has;
.reg .b32 other;
shfl.sync.down.b32 other|has, $1, DISTANCE, 31, 0xffffffff;
mov.b32 $0, $1;
@has add.TYPE $0, $0, other;
}"""


def splat(value: Any, dtype: Any = jnp.float32) -> jax.Array:
    """[THREADS] of equal elements."""
    return plgpu.layout_cast(jnp.full((THREADS,), value, dtype), LANE_LAYOUT)


@dataclasses.dataclass(frozen=True)
class Cta:
    """The warpgroup's view of its CTA. All warpgroups must call its methods equally often."""

    index: jax.Array
    warpgroups: int
    partials: dict[Any, Any]
    """dtype -> [MAX_REDUCED, warpgroups * THREADS] in shared memory, of float32 and int32."""
    written: Any
    read: Any
    joined: Any
    """Barriers with one arrival from each warpgroup."""
    interpret: bool

    @property
    def threads(self) -> int:
        return self.warpgroups * THREADS

    @property
    def columns(self) -> Any:
        """The columns of this warpgroup's threads, where each thread of the CTA has one."""
        return pl.ds(pl.multiple_of(self.index * THREADS, THREADS), THREADS)

    @property
    def thread(self) -> jax.Array:
        """i32[THREADS]: each thread's number in the CTA."""
        return plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=LANE_LAYOUT) + self.index * THREADS

    def start(self) -> None:
        """Before the first reduction."""
        plgpu.barrier_arrive(self.read)

    def finish(self) -> None:
        """After the last reduction."""
        plgpu.barrier_wait(self.read)

    def join(self) -> None:
        """Waits for all threads of the CTA; what they wrote to shared memory is visible to all."""
        plgpu.barrier_arrive(self.joined)
        plgpu.barrier_wait(self.joined)

    def reduce(self, values: Sequence[jax.Array], kinds: Sequence[str]) -> list[jax.Array]:
        """Scalars: each f32 or i32 [THREADS] of all warpgroups reduced, in an order that does not vary."""
        by_warp = [self._of_warp(value, kind) for value, kind in zip(values, kinds, strict=True)]
        results = []
        for kind, parts in zip(kinds, self._exchange(by_warp), strict=True):
            while len(parts) > 1:
                pairs = zip(parts[::2], parts[1::2], strict=True)
                parts = [_COMBINE[kind](a, b) for a, b in pairs]
            results.append(parts[0])
        plgpu.barrier_arrive(self.read)
        return results

    def sums_from(self, families: Sequence[Sequence[jax.Array]]) -> list[list[jax.Array]]:
        """For each family of groups of one value per thread: for each value the sum of it and of all after it.

        In order: the groups, and within a group the threads of the CTA.
        """
        flat = [values for family in families for values in family]
        suffixes = [self._suffix_of_warp(values) for values in flat]
        totals = self._exchange([self._of_warp(values, ADD) for values in flat])
        warp = self.thread // WARP
        results, i = [], 0
        for family in families:
            sums: list[jax.Array] = [None] * len(family)  # pyright: ignore[reportAssignmentType]
            after = jnp.zeros((), family[0].dtype)
            for group in reversed(range(len(family))):
                total = suffixes[i + group] + after
                for w, part in enumerate(totals[i + group]):
                    if w:
                        total = total + jnp.where(warp < w, part, jnp.zeros((), part.dtype))
                    after = after + part
                sums[group] = total
            results.append(sums)
            i += len(family)
        plgpu.barrier_arrive(self.read)
        return results

    def _exchange(self, by_warp: Sequence[jax.Array]) -> list[list[jax.Array]]:
        """For each [THREADS], equal within a warp, the scalars of all warps. The caller arrives at `read` after use."""
        plgpu.barrier_wait(self.read)
        used = dict.fromkeys(self.partials, 0)
        places = []
        for value in by_warp:
            buffer, row = self.partials[value.dtype], used[value.dtype]
            assert row < MAX_REDUCED
            used[value.dtype] += 1
            buffer[row, self.columns] = value
            places.append((buffer, row))
        plgpu.barrier_arrive(self.written)
        plgpu.barrier_wait(self.written)
        return [[buffer[row, first] for first in range(0, self.threads, WARP)] for buffer, row in places]

    def _of_warp(self, values: jax.Array, kind: str) -> jax.Array:
        """[THREADS]: the values of a thread's warp, reduced."""
        if self.interpret:
            totals = _OF_WARP[kind](values.reshape(-1, WARP), axis=1, keepdims=True).astype(values.dtype)
            return jnp.broadcast_to(totals, (THREADS // WARP, WARP)).reshape(THREADS)

        def reduced(value: Any, ptx_type: str) -> Any:
            for distance in (16, 8, 4, 2, 1):
                other = mgpu_utils.shfl_bfly(value, distance)
                value = ptx(f"{kind}.{ptx_type} $0, $1, $2;", value, other, result_types=value.type)
            return value

        return _per_thread(reduced, values)

    def _suffix_of_warp(self, values: jax.Array) -> jax.Array:
        """[THREADS]: the sum of a thread's value and those of the later threads of its warp."""
        if self.interpret:
            warps = values.reshape(-1, WARP)
            return jnp.cumsum(warps[:, ::-1], axis=1, dtype=values.dtype)[:, ::-1].reshape(THREADS)

        def summed(value: Any, ptx_type: str) -> Any:
            for distance in (1, 2, 4, 8, 16):
                step = _SUFFIX_STEP.replace("DISTANCE", str(distance)).replace("TYPE", ptx_type)
                value = ptx(step, value, result_types=value.type, convergent=True)
            return value

        return _per_thread(summed, values)


def ptx(code: str, *arguments: Any, result_types: Any, **options: Any) -> Any:
    """Inline PTX within `plgpu.inline_mgpu`."""
    return mgpu_utils.inline_ptx(code, *arguments, result_types=result_types, **options)  # pyright: ignore[reportAttributeAccessIssue]


def elements(register: Any) -> list[Any]:
    """The scalars of a register of a FragmentedArray."""
    (size,) = ir.VectorType(register.type).shape
    extract = vector.extract
    return [extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i])) for i in range(size)]


def lanes(scalar: Any, is_signed: bool | None = None) -> mgpu.FragmentedArray:
    """The array in LANE_LAYOUT that holds each thread's scalar."""
    register = vector.broadcast(ir.VectorType.get((1,), scalar.type), scalar)
    registers = np.array([register], dtype=object)
    return mgpu.FragmentedArray(_registers=registers, _layout=LANE_LAYOUT.to_mgpu(), _is_signed=is_signed)


def _per_thread(function: Callable[[Any, str], Any], values: jax.Array) -> jax.Array:
    """Applies a function of (a thread's value, its PTX type) to f32 or i32 [THREADS]."""
    signed = True if values.dtype == jnp.int32 else None
    result = plgpu.ShapeDtypeStruct((THREADS,), values.dtype, layout=LANE_LAYOUT)

    @plgpu.inline_mgpu(arg_types=(LANE_LAYOUT,), return_type=result)
    def applied(_: Any, array: Any) -> mgpu.FragmentedArray:
        (value,) = elements(array.registers.item())
        return lanes(function(value, "s32" if signed else "f32"), is_signed=signed)

    return applied(values)  # pyright: ignore[reportReturnType, reportCallIssue]
