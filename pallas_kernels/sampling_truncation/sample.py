"""A histogram of a sample of the row: approximate ranks and masses, from which a scan's brackets are taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import load
from pallas_kernels.sampling_truncation.cta import LANE_LAYOUT, MAX, MIN, Cta, splat
from pallas_kernels.sampling_truncation.histogram import Histogram
from pallas_kernels.sampling_truncation.row_scan import SAMPLED_AT_ONCE, Row
from pallas_kernels.sampling_truncation.scan_step import weight

LOWEST = -3.4028235e38
"""The smallest finite float32: what is below it is masked out."""
_WIDEST = 512.0
"""Bins cover at most this much below the largest value of the sample."""


def finite(value: jax.Array) -> jax.Array:
    return lax.abs(value) <= jnp.float32(-LOWEST)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Bins of equal width up to the largest value of the sample; what is far below it is in none.

    Ranks count the sample's values from the top; masses are relative to exp(largest).
    """

    cta: Cta
    numbers: list[jax.Array]
    """f32[THREADS]: the thread's bins."""
    ranks: list[jax.Array]
    masses: list[jax.Array]
    """f32[THREADS]: number and mass of the sample's values in the thread's bins and those above."""
    size: int
    largest: jax.Array
    lowest: jax.Array
    width: jax.Array
    """The lower edge of the first bin, and the width of each."""
    bins: int

    @classmethod
    def of(cls, row: Row, pool: Any, rows: int, tries: jax.Array, histogram: Histogram) -> Sample:
        """Samples `rows` values for each thread, a multiple of SAMPLED_AT_ONCE; overwrites the pool."""
        cta, bins = row.cta, histogram.bins
        row.sample(pool, rows, tries)

        def folded(function: Callable, carry: Any) -> Any:
            def step(i: Any, carry: Any) -> Any:
                for j in range(SAMPLED_AT_ONCE):
                    carry = function(carry, load(pool.at[i * SAMPLED_AT_ONCE + j, cta.columns], LANE_LAYOUT))
                return carry

            return lax.fori_loop(0, rows // SAMPLED_AT_ONCE, step, carry)

        def extremes(carry: tuple, x: jax.Array) -> tuple:
            return lax.max(carry[0], x), lax.min(carry[1], jnp.where(x >= LOWEST, x, jnp.inf))

        largest, smallest = cta.reduce(folded(extremes, (splat(-jnp.inf), splat(jnp.inf))), [MAX, MIN])
        largest = jnp.where(finite(largest), largest, 0.0)
        lowest = lax.max(lax.min(smallest, largest), largest - _WIDEST)
        width = lax.max(largest - lowest, lax.abs(largest) * 1e-5 + 1e-30) / bins
        scale = 1 / width
        one = splat(1, dtype=jnp.int32)

        def count(_: None, x: jax.Array) -> None:
            number = lax.max(lax.min(((x - lowest) * scale).astype(jnp.int32), jnp.int32(bins - 1)), jnp.int32(0))
            histogram.add(jnp.where(x >= lowest, number, -1), one)

        folded(count, None)
        counts = [count.astype(jnp.float32) for count in histogram.take()]
        numbers = [number.astype(jnp.float32) for number in histogram.numbers]
        masses = [
            count * weight(lowest + (number + 0.5) * width, largest)
            for count, number in zip(counts, numbers, strict=True)
        ]
        ranks, masses = cta.sums_from([counts, masses])
        return cls(cta, numbers, ranks, masses, rows * cta.threads, largest, lowest, width, bins)

    def bin_of(self, value: jax.Array) -> jax.Array:
        """The bin of a value, the first or last one for values outside."""
        number = (value - self.lowest) / self.width
        number = lax.max(lax.min(number, jnp.float32(self.bins - 1)), jnp.float32(0))
        return number.astype(jnp.int32).astype(jnp.float32)

    def low_edge(self, number: jax.Array) -> jax.Array:
        """The lower edge of a bin; of bin -1, LOWEST."""
        return jnp.where(number < 0, LOWEST, self.lowest + number * self.width)

    def high_edge(self, number: jax.Array) -> jax.Array:
        """The upper edge of a bin; of the last one, infinity."""
        return jnp.where(number + 1 >= self.bins, jnp.inf, self.lowest + (number + 1) * self.width)

    def at_rank(self, rank: jax.Array) -> Lookup:
        """The bin of the value of a rank; -1 when there is none."""
        found = [jnp.where(r >= rank, n, -1.0) for r, n in zip(self.ranks, self.numbers, strict=True)]
        return Lookup(_fold(lax.max, found), MAX)

    def rank_from(self, number: jax.Array) -> Lookup:
        """How many values are in a bin and above."""
        found = [jnp.where(n <= number, r, jnp.inf) for r, n in zip(self.ranks, self.numbers, strict=True)]
        return Lookup(_fold(lax.min, found), MIN)

    def mass_from(self, number: jax.Array, rank: jax.Array) -> Lookup:
        """The mass from a bin on, or from the value of a rank, whichever is less."""
        found = [
            jnp.where((n <= number) | (r >= rank), m, jnp.inf)
            for m, r, n in zip(self.masses, self.ranks, self.numbers, strict=True)
        ]
        return Lookup(_fold(lax.min, found), MIN)

    def rank_at_mass(self, mass: jax.Array) -> Lookup:
        """How many values make up a mass."""
        found = [jnp.where(m >= mass, r, float(self.size)) for m, r in zip(self.masses, self.ranks, strict=True)]
        return Lookup(_fold(lax.min, found), MIN)

    def look_up(self, *lookups: Lookup) -> list[jax.Array]:
        """The scalars."""
        return self.cta.reduce([lookup.values for lookup in lookups], [lookup.kind for lookup in lookups])


@dataclasses.dataclass(frozen=True)
class Lookup:
    """f32[THREADS] whose reduction is the result."""

    values: jax.Array
    kind: str


def _fold(combine: Any, values: list[jax.Array]) -> jax.Array:
    result = values[0]
    for value in values[1:]:
        result = combine(result, value)
    return result
