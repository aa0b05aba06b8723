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
from pallas_kernels.sampling_truncation.cta import ADD, LANE_LAYOUT, MAX, THREADS, VECTOR, VECTOR_LAYOUT, Cta
from pallas_kernels.sampling_truncation.scan_step import BOTH, FLOOR, TOP, Brackets, Tally, visit

SAMPLED_AT_ONCE = 8


class Scan(NamedTuple):
    """What one scan found: Tally's sums over the whole row."""

    counts: jax.Array
    """i32[THREADS]: how many candidates each thread found; it holds as many as have a slot."""
    most: jax.Array
    """i32: the largest count of all threads; above the number of slots, candidates were dropped."""
    maximum: jax.Array
    count_low: jax.Array
    count_high: jax.Array
    mass_high: jax.Array
    mass_top_low: jax.Array
    mass_top_high: jax.Array


@dataclasses.dataclass(frozen=True)
class Row:
    """A row f32[V] in global memory, V a multiple of THREADS and at least VECTOR, and the CTA that works on it."""

    values: Any
    cta: Cta
    loads: int
    """Vectors of a tile, which a thread loads together; a scan loads the next tile before it works on one."""

    @property
    def size(self) -> int:
        return self.values.shape[0]

    def sample(self, pool: Any, rows: int, tries: jax.Array) -> None:
        """Fills the first rows of the threads' columns of `pool` with evenly spread values; each try, with others."""
        cta, total = self.cta, self.size // THREADS
        blocks = rows * cta.warpgroups
        shift = lax.rem(tries, jnp.int32(max(1, total // blocks)))

        @pl.loop(0, rows // SAMPLED_AT_ONCE)
        def _(step: Any) -> None:
            found = []
            for i in range(SAMPLED_AT_ONCE):
                number = (step * SAMPLED_AT_ONCE + i) * cta.warpgroups + cta.index
                start = pl.multiple_of((lax.div(number * total, blocks) + shift) * THREADS, THREADS)
                found.append(load(self.values.at[pl.ds(start, THREADS)], LANE_LAYOUT))
            for i, values in enumerate(found):
                pool[step * SAMPLED_AT_ONCE + i, cta.columns] = values

    def scan(self, pool: Any, brackets: Brackets, reference: jax.Array, masses: jax.Array) -> Scan:
        """One pass over the row; see `visit`. Without `masses`, which top-p needs, top_low must be infinite."""

        def tallied(purpose: str) -> Tally:
            visited = functools.partial(visit, self.cta, pool, brackets=brackets, reference=reference, purpose=purpose)
            return self._fold(visited, Tally.empty())

        tally = lax.cond(
            masses,
            lambda: lax.cond(brackets.floor_low < brackets.floor_high, lambda: tallied(BOTH), lambda: tallied(TOP)),
            lambda: tallied(FLOOR),
        )
        kinds = [MAX, MAX, *[ADD] * (len(tally) - 2)]
        return Scan(tally.counts, *self.cta.reduce(tally, kinds))

    def store_kept(self, output: Any, lowest: jax.Array) -> None:
        """Writes the row with -inf for what lies below `lowest`.

        From the end, which a scan read last, to the start: what the L2 still has of the row is used.
        """

        def store(start: Any, values: jax.Array) -> None:
            output[pl.ds(start, values.shape[0])] = jnp.where(values >= lowest, values, -jnp.inf)

        tail = self.size % VECTOR
        if tail:

            @pl.when(self.cta.index == 0)
            def _():
                layout = plgpu.Layout.WG_STRIDED((tail,), vec_size=math.gcd(tail // THREADS, 4))
                store(self.size - tail, load(self.values.at[pl.ds(self.size - tail, tail)], layout))

        for vector, exists in self._left_over():

            @pl.when(exists)
            def _(vector=vector):
                start = pl.multiple_of(vector * VECTOR, VECTOR)
                store(start, self._load(start))

        @pl.loop(0, self._steps)
        def _(step: Any) -> None:
            starts = list(self._starts(self._steps - 1 - step))
            for start, values in zip(starts, [self._load(start) for start in starts], strict=True):
                store(start, values)

    def _fold(self, visited: Callable, carry: Tally) -> Tally:
        """Folds `visited` over lists of this warpgroup's vectors; positions that belong to no one read as -inf."""
        steps = self._steps

        def loaded(step: Any) -> tuple:
            return tuple(self._load(start) for start in self._starts(step))

        def tile(step: Any, state: tuple) -> tuple:
            carry, values = state
            following = loaded(lax.min(step + 1, steps - 1))
            return visited(carry, values), following

        if steps:
            carry, _ = lax.fori_loop(0, steps, tile, (carry, loaded(0)))
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
        masked = [jnp.where(position >= skipped, values, -jnp.inf) for skipped, values in found]
        return visited(carry, masked) if masked else carry

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
