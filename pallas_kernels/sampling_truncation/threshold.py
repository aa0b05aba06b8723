"""The search for a row's threshold: brackets from a sample, one scan that collects what lies in them, then the exact
value among those candidates. A scan that misses narrows the bracket for the next one.

The floor is the threshold of top-k and min-p: max(k-th value, maximum + log(min_p)). The threshold of top-p is the
largest value t >= floor whose mass from t on is at least p times the mass from the floor on. Masses are sums of
exp(x - reference). Sums and their order do not vary between runs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sampling_truncation.candidates import Candidates
from pallas_kernels.sampling_truncation.histogram import Histogram
from pallas_kernels.sampling_truncation.planning import ABOVE, BELOW, CROWDED, Goal, Options, Planner, above
from pallas_kernels.sampling_truncation.row_scan import Row, Scan
from pallas_kernels.sampling_truncation.sample import LOWEST, Sample, finite
from pallas_kernels.sampling_truncation.scan_step import Brackets

_MOST_TRIES = 60
"""Scans for one goal. More than any row needs: whatever a row holds, it must not hang the device."""
_SMALLEST_MASS = 1e-30
_MAX_EXPONENT = 60.0
"""A reference further than this from the maximum could overflow or lose the masses."""


class State(NamedTuple):
    """Between two scans."""

    done: jax.Array
    threshold: jax.Array
    floor_known: jax.Array
    floor: jax.Array
    goal: Goal
    """The floor; once that is known, the threshold of top-p."""
    tries: jax.Array
    """Scans for this goal."""
    reference: jax.Array
    referenced: jax.Array
    """Whether there is a reference."""


@dataclasses.dataclass(frozen=True)
class Search:
    """The search of one CTA for its row's threshold."""

    row: Row
    pool: Any
    """f32[slots, threads] in shared memory."""
    histogram: Histogram
    samples: int
    """Values of the sample for each thread."""
    budget: float
    """How many values a scan should collect."""

    def threshold(self, options: Options) -> jax.Array:
        """The smallest value of the row that is kept."""
        no, lowest = jnp.bool_(False), jnp.float32(LOWEST)
        start = State(no, lowest, no, lowest, Goal.anywhere(lowest), jnp.int32(0), jnp.float32(0), no)

        def unfinished(state: State) -> jax.Array:
            return ~state.done & (state.tries < _MOST_TRIES)

        return lax.while_loop(unfinished, lambda state: self._once(options, state), start).threshold

    def _once(self, options: Options, state: State) -> State:
        def planned() -> tuple[Brackets, jax.Array]:
            sample = Sample.of(self.row, self.pool, self.samples, state.tries, self.histogram)
            planner = Planner(sample, options, self.row.size, self.budget)
            brackets = planner.brackets(state.floor_known, state.floor, state.goal, state.tries)
            return brackets, jnp.where(state.referenced, state.reference, sample.largest)

        def maximum_only() -> tuple[Brackets, jax.Array]:
            lowest, infinity = jnp.float32(LOWEST), jnp.float32(jnp.inf)
            return Brackets(lowest, lowest, infinity, infinity), jnp.float32(0)

        brackets, reference = lax.cond(options.uses_k | options.uses_p, planned, maximum_only)
        scan = self.row.scan(self.pool, brackets, reference, options.uses_p)
        known, floor, goal = self._floor(options, state, brackets, scan)
        return self._top(options, state, brackets, scan, reference, known, floor, goal)

    def _floor(
        self, options: Options, state: State, brackets: Brackets, scan: Scan
    ) -> tuple[jax.Array, jax.Array, Goal]:
        """Whether the floor is known, the floor, and where it is if not."""
        low, high, _, _ = brackets
        of_min_p = lax.max(scan.maximum + options.log_min_p, jnp.float32(LOWEST))
        searched = options.uses_k & ~state.floor_known
        over = searched & (scan.count_high >= options.k)
        reached = scan.count_low >= options.k
        # Below `low`, the k-th value does not matter if the threshold of min-p is not, or if nothing finite is there.
        under = searched & ~reached & (of_min_p < low) & (low > LOWEST)
        inside = searched & ~over & reached
        end = lax.min(high, above(scan.maximum))
        one_value = above(low) >= end
        crowded = inside & (scan.most > self._slots) & ~one_value
        kth = lax.cond(
            inside & ~crowded & ~one_value,
            lambda: self._candidates(scan).select_count(low, end, scan.count_high, options.k),
            lambda: jnp.where(inside, low, LOWEST),
        )
        known = state.floor_known | ~(over | under | crowded)
        floor = jnp.where(state.floor_known, state.floor, lax.max(kth, of_min_p))
        mode = jnp.where(over, ABOVE, jnp.where(under, BELOW, CROWDED))
        goal = Goal(
            jnp.where(over, high, jnp.where(under, state.goal.low, low)),
            jnp.where(over, lax.min(state.goal.high, above(scan.maximum)), jnp.where(under, low, end)),
            mode,
        )
        return known, floor, goal

    def _top(
        self,
        options: Options,
        state: State,
        brackets: Brackets,
        scan: Scan,
        reference: jax.Array,
        known: jax.Array,
        floor: jax.Array,
        goal: Goal,
    ) -> State:
        """The next state, given what the scan said about the floor."""
        _, floor_high, top_low, top_high = brackets
        end = lax.min(top_high, above(scan.maximum))
        crowded = scan.most > self._slots
        fits = (lax.abs(scan.maximum - reference) < _MAX_EXPONENT) | ~finite(scan.maximum)

        # The mass from the floor on: a sum of the scan, and the candidates between the floor and that sum's bound.
        at_bound = floor == floor_high
        in_top = ~at_bound & (floor >= top_low) & (floor < top_high)
        in_floor = ~at_bound & ~in_top & (floor >= brackets.floor_low) & (floor < floor_high)
        counted = options.uses_p & known & fits & (at_bound | (~crowded & (in_top | in_floor)))
        bound = jnp.where(in_top, top_high, floor_high)
        between = lax.cond(
            counted & ~at_bound,
            lambda: self._candidates(scan).mass(floor, bound, reference),
            lambda: jnp.float32(0),
        )
        total = jnp.where(in_top, scan.mass_top_high, scan.mass_high) + between
        target = lax.max(options.p * total, jnp.float32(_SMALLEST_MASS))

        from_floor = in_top | (top_low <= floor_high)
        low = jnp.where(from_floor, floor, top_low)
        mass_low = jnp.where(from_floor, total, scan.mass_top_low)
        over = counted & (scan.mass_top_high >= target)
        under = counted & ~over & (mass_low < target)
        inside = counted & ~over & ~under
        one_value = above(low) >= end
        search = inside & ~crowded & ~one_value
        threshold = lax.cond(
            search,
            lambda: self._candidates(scan).select_mass(low, end, mass_low, scan.mass_top_high, target, reference),
            lambda: low,
        )
        found = search | (inside & one_value)
        infinity = jnp.float32(jnp.inf)

        # The goal of the next scan: what _floor found; or what was found here; or the same again; or a new one.
        missed, same = known & counted, state.floor_known
        old_low, old_high = (jnp.where(same, *pair) for pair in ((state.goal.low, floor), (state.goal.high, infinity)))
        next_low = jnp.where(over, top_high, jnp.where(under, old_low, low))
        next_high = jnp.where(over, lax.min(old_high, above(scan.maximum)), jnp.where(under, low, end))
        next_mode = jnp.where(over, ABOVE, jnp.where(under, BELOW, CROWDED))
        new = Goal(
            jnp.where(known, jnp.where(missed, next_low, old_low), goal.low),
            jnp.where(known, jnp.where(missed, next_high, old_high), goal.high),
            jnp.where(known, jnp.where(missed, next_mode, jnp.where(same, state.goal.mode, 0)), goal.mode),
        )
        done = found | (known & ~options.uses_p) | ~finite(scan.maximum)
        return State(
            done=done,
            threshold=lax.max(floor, jnp.where(found, threshold, LOWEST)),
            floor_known=known,
            floor=floor,
            goal=new,
            tries=jnp.where(known == state.floor_known, state.tries + 1, 0),
            reference=jnp.where(fits, reference, scan.maximum),
            referenced=jnp.bool_(True),
        )

    @property
    def _slots(self) -> int:
        return self.pool.shape[0]

    def _candidates(self, scan: Scan) -> Candidates:
        return Candidates(self.pool, scan, self.histogram)
