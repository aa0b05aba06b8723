"""The search for a row's threshold: a bracket from a sample, one scan that collects what lies in it, then the exact
value among those candidates. A scan that misses narrows the bracket for the next one.

All sums S(t) are over the values x >= t, of 1 (top-k) or of exp(x - reference) (top-p); the threshold is the largest
value with S(t) >= target. Sums and their order do not vary between runs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import load
from pallas_kernels.sampling_truncation.cta import ADD, LANE_LAYOUT, MAX, MIN, Pool, splat
from pallas_kernels.sampling_truncation.row_scan import LOWEST, Row, Scan, weight

_ROWS_AT_ONCE = 4
_MOST_SCANS = 200
_MOST_NARROWINGS = 400
"""Far more than any row needs: whatever a row holds, it must not hang the device."""
_SMALLEST_MASS = 1e-30
_MAX_EXPONENT = 60.0
"""A reference further than this from the maximum could overflow or lose the masses."""


class Options(NamedTuple):
    """A row's options as scalars."""

    k: jax.Array
    p: jax.Array
    log_min_p: jax.Array
    uses_k: jax.Array
    uses_p: jax.Array


class Bracket(NamedTuple):
    """The threshold lies in [low, high): S(low) >= target > S(high)."""

    low: jax.Array
    high: jax.Array
    sum_low: jax.Array
    sum_high: jax.Array
    done: jax.Array
    """The candidates of the last scan hold the threshold, or it is `low` itself."""
    crowded: jax.Array
    """The last scan hit the threshold but dropped candidates."""
    scans: jax.Array
    """How many there were."""

    @property
    def open(self) -> jax.Array:
        """Whether another scan is needed."""
        return ~self.done & (self.scans < _MOST_SCANS)


def _start(low: Any, high: Any, sum_low: Any) -> Bracket:
    """Before the first scan."""
    return Bracket(low, high, sum_low, jnp.float32(0), jnp.bool_(False), jnp.bool_(False), jnp.int32(0))


def above(value: jax.Array) -> jax.Array:
    """The next float32 after a finite one; after 0, the smallest normal one."""
    return value + lax.max(lax.abs(value) * jnp.float32(5.9604656e-08), jnp.float32(1.1754944e-38))


def _finite(value: jax.Array) -> jax.Array:
    return lax.abs(value) <= jnp.float32(-LOWEST)


@dataclasses.dataclass(frozen=True)
class Search:
    """The search of one CTA for its row's threshold."""

    row: Row
    sample_values: Any
    candidate_values: Any
    wanted_candidates: int
    """How many values a scan should collect when the sample leaves the choice."""

    def threshold(self, options: Options) -> jax.Array:
        """The smallest value of the row that is kept."""
        sample, largest = self.row.sample(self.sample_values)
        scan, bracket, reference = self._top_k(options, sample, largest)

        def kth() -> jax.Array:
            return self._finish(scan, bracket, scan.count_high, options.k, None)

        lowest = jnp.float32(LOWEST)
        floor = lax.max(scan.maximum + options.log_min_p, lax.cond(options.uses_k, kth, lambda: lowest))
        floor = lax.max(floor, lowest)
        return lax.cond(options.uses_p, lambda: self._nucleus(options.p, sample, scan, floor, reference), lambda: floor)

    def _top_k(self, options: Options, sample: Pool, largest: jax.Array) -> tuple[Scan, Bracket, jax.Array]:
        """Scans until the candidates hold the k-th value; without top-k, one scan for the top of the row.

        Also returns the reference of the scan's masses.
        """
        lowest, infinity, zero = jnp.float32(LOWEST), jnp.float32(jnp.inf), jnp.float32(0)
        start = _start(lowest, infinity, jnp.float32(self.row.size))

        def once(state: tuple[Scan, Bracket, jax.Array]) -> tuple[Scan, Bracket, jax.Array]:
            _, bracket, reference = state
            low, high = lax.cond(
                options.uses_k,
                lambda: self._around_count(sample, bracket, options.k),
                lambda: (self._select(sample, zero, jnp.float32(self._sample_width), lowest, infinity, None), infinity),
            )
            scan = lax.cond(
                options.uses_p,
                lambda: self.row.scan(self.candidate_values, low, high, reference, lowest, masses=True),
                lambda: self.row.scan(self.candidate_values, low, high, reference, lowest, masses=False),
            )
            fits = ~options.uses_p | (lax.abs(scan.maximum - reference) < _MAX_EXPONENT) | ~_finite(scan.maximum)
            narrowed = self._narrowed(bracket, scan, scan.count_low, scan.count_high, options.k)
            # Without top-k nothing reads the bracket.
            narrowed = narrowed._replace(done=fits & (narrowed.done | ~options.uses_k))
            return scan, narrowed, jnp.where(fits, reference, scan.maximum)

        empty = Scan(zero, zero, splat(0, dtype=jnp.int32), *[zero] * (len(Scan._fields) - 3))
        reference = jnp.where(largest >= LOWEST, largest, zero)
        return lax.while_loop(lambda state: state[1].open, once, (empty, start, reference))

    def _nucleus(self, p: Any, sample: Pool, scan: Scan, floor: Any, reference: Any) -> jax.Array:
        """The threshold of top-p among the values from `floor` on, after a scan with masses."""

        def scanned(low: jax.Array, high: jax.Array) -> Scan:
            return self.row.scan(self.candidate_values, low, high, reference, floor, masses=True)

        covered = (floor >= scan.low) & (floor < scan.high) & (scan.most <= self._rows)
        scan = lax.cond(covered | (floor <= LOWEST), lambda: scan, lambda: scanned(scan.low, scan.high))
        (inside,), _, _ = self._sums(self._candidates(scan), [floor], floor, scan.high, reference)
        total = jnp.where(covered, scan.mass_high + inside, scan.mass_floor)
        target = lax.max(p * total, jnp.float32(_SMALLEST_MASS))
        start = _start(floor, above(scan.maximum), total)
        sum_low = jnp.where(scan.low <= floor, total, scan.mass_low)
        sum_high = jnp.where(scan.high <= floor, total, scan.mass_high)

        def once(state: tuple[Scan, Bracket]) -> tuple[Scan, Bracket]:
            bracket = state[1]
            scan = scanned(*self._around_mass(sample, bracket, target, reference))
            return scan, self._narrowed(bracket, scan, scan.mass_low, scan.mass_high, target)

        first = scan, self._narrowed(start, scan, sum_low, sum_high, target)
        scan, bracket = lax.while_loop(lambda state: state[1].open, once, first)
        return self._finish(scan, bracket, scan.mass_high, target, reference)

    def _narrowed(self, bracket: Bracket, scan: Scan, sum_low: Any, sum_high: Any, target: Any) -> Bracket:
        """The bracket after a scan with these sums at its ends."""
        below, over = target > sum_low, target <= sum_high
        inside = ~below & ~over
        low = jnp.where(over, lax.max(scan.high, bracket.low), bracket.low)
        low = jnp.where(inside, lax.max(scan.low, bracket.low), low)
        high = jnp.where(below, lax.min(scan.low, bracket.high), bracket.high)
        high = jnp.where(inside, lax.min(scan.high, bracket.high), high)
        high = lax.min(high, above(scan.maximum))
        high = jnp.where(inside & (above(low) >= high), low, high)
        crowded = inside & (scan.most > self._rows)
        return Bracket(
            low=low,
            high=high,
            sum_low=jnp.where(over, sum_high, jnp.where(inside, sum_low, bracket.sum_low)),
            sum_high=jnp.where(below, sum_low, jnp.where(inside, sum_high, bracket.sum_high)),
            done=~(low < high) | (inside & ~crowded) | ~_finite(scan.maximum),
            crowded=crowded,
            scans=bracket.scans + 1,
        )

    def _finish(self, scan: Scan, bracket: Bracket, base: Any, target: Any, reference: Any) -> jax.Array:
        """The threshold, when the bracket is done; `base` is the sum above the candidates."""
        return self._select(self._candidates(scan), base, target, bracket.low, bracket.high, reference)

    def _around_count(self, sample: Pool, bracket: Bracket, target: Any) -> tuple[jax.Array, jax.Array]:
        """(low, high) of the next scan for a number of values."""
        (size,), _, _ = self._sums(sample, [bracket.low], bracket.low, bracket.high, None)
        share = (target - bracket.sum_high) / lax.max(bracket.sum_low - bracket.sum_high, jnp.float32(1))
        return self._around_rank(sample, bracket, share * size, size)

    def _around_mass(self, sample: Pool, bracket: Bracket, target: Any, reference: Any) -> tuple[jax.Array, jax.Array]:
        """(low, high) of the next scan for a mass."""
        zero = jnp.float32(0)
        (size,), _, _ = self._sums(sample, [bracket.low], bracket.low, bracket.high, None)
        (mass,), _, _ = self._sums(sample, [bracket.low], bracket.low, bracket.high, reference)
        share = (target - bracket.sum_high) / lax.max(bracket.sum_low - bracket.sum_high, jnp.float32(_SMALLEST_MASS))
        wanted = lax.max(share * mass, jnp.float32(_SMALLEST_MASS))
        guess = self._select(sample, zero, wanted, bracket.low, bracket.high, reference)
        (rank,), _, _ = self._sums(sample, [guess], guess, bracket.high, None)
        return self._around_rank(sample, bracket, rank, size)

    def _around_rank(self, sample: Pool, bracket: Bracket, rank: Any, size: Any) -> tuple[jax.Array, jax.Array]:
        """(low, high) about the value of this rank, from the top, of the sample's `size` values in the bracket."""
        zero = jnp.float32(0)
        spread = 4 * lax.sqrt(lax.max(rank * (1 - rank / lax.max(size, jnp.float32(1))), zero)) + 10
        spread = lax.min(spread, jnp.float32(self._sample_width))

        def value_at(rank: Any) -> jax.Array:
            return self._select(sample, zero, rank, bracket.low, bracket.high, None)

        low = lax.cond(rank + spread >= size, lambda: bracket.low, lambda: value_at(rank + spread))
        high = lax.cond(rank - spread < 1, lambda: bracket.high, lambda: lax.max(value_at(rank - spread), above(low)))
        middle = lax.max(bracket.low * 0.5 + bracket.high * 0.5, above(bracket.low))
        return jnp.where(bracket.crowded, middle, low), jnp.where(bracket.crowded, bracket.high, high)

    def _select(self, pool: Pool, base: Any, target: Any, low: Any, high: Any, reference: Any) -> jax.Array:
        """The largest value t in [low, high) of the pool with base + S(t) >= target; `low` if there is none.

        S sums the pool's values in [t, high), with the `high` given.
        """
        limit = high

        def narrow(state: tuple) -> tuple:
            low, high, _, _, step = state
            pivots = [low * (1 - f) + lax.min(high, jnp.float32(-LOWEST)) * f for f in (0.25, 0.5, 0.75)]
            pivots = [jnp.where((q > low) & (q < high), q, above(low)) for q in pivots]
            sums, least, most = self._sums(pool, pivots, low, high, reference, limit)
            low, high = lax.max(low, least), lax.min(high, above(most))
            for pivot, total in zip(pivots, sums, strict=True):
                reached = base + total >= target
                low = jnp.where(reached, lax.max(low, pivot), low)
                high = jnp.where(reached, high, lax.min(high, pivot))
            return jnp.where(least <= most, low, state[0]), high, least, most, step + 1

        def unfinished(state: tuple) -> jax.Array:
            low, high, least, most, step = state
            return (low < high) & (least < most) & (step < _MOST_NARROWINGS)

        infinity = jnp.float32(jnp.inf)
        state = lax.while_loop(unfinished, narrow, (low, high, -infinity, infinity, jnp.int32(0)))
        return state[0]

    def _sums(
        self, pool: Pool, pivots: list[Any], low: Any, high: Any, reference: Any, limit: Any = None
    ) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        """For each pivot the sum over the pool's values in [pivot, limit), and their extremes in [low, high).

        Without a reference, sums count; without a limit, it is `high`. The extremes are (inf, -inf) when there are no
        values.
        """
        limit = high if limit is None else limit
        cta, values = self.row.cta, pool.values

        def rows(i: Any, carry: tuple) -> tuple:
            for j in range(_ROWS_AT_ONCE):
                row = i * _ROWS_AT_ONCE + j
                x = load(values.at[row, cta.columns], LANE_LAYOUT)
                x = jnp.where((pool.counts > row) & (x < limit), x, -jnp.inf)
                share = 1.0 if reference is None else weight(x, reference)
                least, most, *sums = carry
                sums = [total + jnp.where(x >= q, share, 0.0) for total, q in zip(sums, pivots, strict=True)]
                inside = (x >= low) & (x < high)
                least = lax.min(least, jnp.where(inside, x, jnp.inf))
                carry = least, lax.max(most, jnp.where(inside, x, -jnp.inf)), *sums
            return carry

        empty = splat(jnp.inf), splat(-jnp.inf), *[splat(0.0)] * len(pivots)
        steps = lax.div(pool.used_rows + (_ROWS_AT_ONCE - 1), _ROWS_AT_ONCE)
        found = lax.fori_loop(0, steps, rows, empty)
        least, most, *sums = cta.reduce(found, [MIN, MAX, *[ADD] * len(pivots)])
        return sums, least, most

    @property
    def _rows(self) -> float:
        """How many candidates a thread can hold."""
        return float(self.candidate_values.shape[0])

    @property
    def _sample_width(self) -> float:
        """Half of `wanted_candidates`, as a number of values of the sample."""
        rows, columns = self.sample_values.shape
        return self.wanted_candidates / 2 * rows * columns / self.row.size

    def _candidates(self, scan: Scan) -> Pool:
        used = lax.min(scan.most, jnp.float32(self._rows)).astype(jnp.int32)
        return Pool(self.candidate_values, scan.candidates, used)
