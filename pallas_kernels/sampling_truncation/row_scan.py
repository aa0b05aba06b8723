"""What a CTA does with its row in global memory: sample it, scan it for sums and candidates, store what is kept."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import load
from pallas_kernels.sampling_truncation.cta import (
    ADD,
    LANE_LAYOUT,
    MAX,
    THREADS,
    VECTOR,
    VECTOR_LAYOUT,
    Cta,
    Pool,
    splat,
)

LOWEST = -3.4028235e38
"""The smallest finite float32: what is below it is masked out."""
_LOG2E = math.log2(math.e)


def weight(values: jax.Array, reference: Any) -> jax.Array:
    """exp(values - reference)."""
    return jnp.exp2((values - reference) * _LOG2E)


class Scan(NamedTuple):
    """What one scan found. Masses are sums of weight(x, reference); zero in a scan without masses."""

    low: jax.Array
    high: jax.Array
    """Candidates are the values in [low, high)."""
    candidates: jax.Array
    """i32[THREADS]: the counts of the pool of candidates."""
    most: jax.Array
    """f32: the largest count of all threads; above the pool's rows, candidates were dropped."""
    maximum: jax.Array
    count_low: jax.Array
    count_high: jax.Array
    mass_low: jax.Array
    mass_high: jax.Array
    """Number and mass of the values from low on, and from high on."""
    mass_floor: jax.Array
    """Mass of the values from the floor on."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row f32[V] in global memory, V a multiple of THREADS and at least VECTOR, and the CTA that works on it."""

    values: Any
    cta: Cta
    loads: int
    """Vectors of a tile, which a thread loads together."""
    ahead: bool
    """Whether a scan loads the next tile before it works on one."""

    @property
    def size(self) -> int:
        return self.values.shape[0]

    def sample(self, into: Any) -> tuple[Pool, jax.Array]:
        """Fills a pool with evenly spread values. Returns it and the largest of them."""
        rows, cta = into.shape[0], self.cta
        blocks, total = rows * cta.warpgroups, self.size // THREADS
        largest = splat(-jnp.inf)
        for i in range(rows):
            block = lax.div((i * cta.warpgroups + cta.index) * total, blocks)
            values = load(self.values.at[pl.ds(pl.multiple_of(block * THREADS, THREADS), THREADS)], LANE_LAYOUT)
            into[i, cta.columns] = values
            largest = lax.max(largest, values)
        (largest,) = cta.reduce([largest], [MAX])
        return Pool(into, splat(rows, dtype=jnp.int32), jnp.int32(rows)), largest

    def scan(
        self, into: Any, low: jax.Array, high: jax.Array, reference: jax.Array, floor: jax.Array, *, masses: bool
    ) -> Scan:
        """One pass over the row: collects the candidates in [low, high) and sums up what lies above."""
        cta = self.cta

        def visit(carry: tuple, values: jax.Array) -> tuple:
            counts, largest, count_high, *sums = carry
            counts = cta.compact(into, counts, values, low, high)
            above = values >= high
            carry = counts, lax.max(largest, values), count_high + jnp.where(above, 1.0, 0.0)
            if masses:
                mass = weight(values, reference)
                parts = (jnp.where(test, mass, 0.0) for test in (values >= low, above, values >= floor))
                carry = *carry, *(total + part for total, part in zip(sums, parts, strict=True))
            return carry

        empty = (splat(0, dtype=jnp.int32), splat(-jnp.inf, VECTOR), *[splat(0.0, VECTOR)] * (4 if masses else 1))
        counts, largest, *sums = self._fold(visit, empty)
        count = counts.astype(jnp.float32)
        kinds = [MAX, ADD, MAX, *[ADD] * len(sums)]
        most, inside, maximum, count_high, *totals = cta.reduce([count, count, largest, *sums], kinds)
        zero = jnp.float32(0)
        mass_low, mass_high, mass_floor = totals or (zero, zero, zero)
        return Scan(low, high, counts, most, maximum, count_high + inside, count_high, mass_low, mass_high, mass_floor)

    def store_kept(self, output: Any, lowest: jax.Array) -> None:
        """Writes the row with -inf for what lies below `lowest`."""

        def store(start: Any, values: jax.Array) -> None:
            output[pl.ds(start, values.shape[0])] = jnp.where(values >= lowest, values, -jnp.inf)

        @pl.loop(0, self._steps)
        def _(step: Any) -> None:
            starts = list(self._starts(step))
            for start, values in zip(starts, [self._load(start) for start in starts], strict=True):
                store(start, values)

        for vector, exists in self._left_over():

            @pl.when(exists)
            def _(vector=vector):
                start = pl.multiple_of(vector * VECTOR, VECTOR)
                store(start, self._load(start))

        tail = self.size % VECTOR
        if tail:

            @pl.when(self.cta.index == 0)
            def _():
                layout = plgpu.Layout.WG_STRIDED((tail,), vec_size=math.gcd(tail // THREADS, 4))
                store(self.size - tail, load(self.values.at[pl.ds(self.size - tail, tail)], layout))

    def _fold(self, visit: Callable, carry: tuple) -> tuple:
        """Folds `visit` over this warpgroup's vectors; positions that belong to no one read as -inf."""

        steps = self._steps

        def loaded(step: Any) -> tuple:
            return tuple(self._load(start) for start in self._starts(step))

        def tile(step: Any, state: tuple) -> tuple:
            carry, values = state
            following = loaded(lax.min(step + 1, steps - 1))
            return functools.reduce(visit, values, carry), following

        if steps and self.ahead:
            carry, _ = lax.fori_loop(0, steps, tile, (carry, loaded(0)))
        elif steps:
            carry = lax.fori_loop(0, steps, lambda step, carry: functools.reduce(visit, loaded(step), carry), carry)
        vectors = [vector for vector, _ in self._left_over()]
        if self.size % VECTOR:
            # The row's last vector overlaps the one before; one warpgroup takes the part that is left.
            vectors.append(jnp.where(self.cta.index == 0, self.size // VECTOR, self.size))
        position = plgpu.broadcasted_iota(jnp.int32, (VECTOR,), 0, layout=VECTOR_LAYOUT)
        last = self.size - VECTOR
        found = []
        for vector in vectors:
            start = pl.multiple_of(lax.min(vector * VECTOR, last), THREADS)
            found.append((vector * VECTOR - start, self._load(start)))
        for skipped, values in found:
            carry = visit(carry, jnp.where(position >= skipped, values, -jnp.inf))
        return carry

    @property
    def _steps(self) -> int:
        """How many tiles of `loads` vectors each warpgroup has."""
        return self.size // VECTOR // (self.loads * self.cta.warpgroups)

    def _starts(self, step: Any) -> Iterator[Any]:
        """The positions of the vectors of this warpgroup's tile."""
        tile = step * self.cta.warpgroups + self.cta.index
        first = pl.multiple_of(tile * (self.loads * VECTOR), self.loads * VECTOR)
        return (first + j * VECTOR for j in range(self.loads))

    def _left_over(self) -> Iterator[tuple[Any, Any]]:
        """This warpgroup's (vector, whether it exists) after the full tiles; a tail is not a vector."""
        vectors, together = self.size // VECTOR, self.loads * self.cta.warpgroups
        first = vectors // together * together
        for base in range(first, vectors, self.cta.warpgroups):
            vector = base + self.cta.index
            exists = vector < vectors
            yield jnp.where(exists, vector, self.size), exists

    def _load(self, start: Any) -> jax.Array:
        return load(self.values.at[pl.ds(start, VECTOR)], VECTOR_LAYOUT)
