"""Which brackets the next scan of a row gets: from its sample, and from what the scans before found."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sampling_truncation.ordered import ordered_scalar, value_of
from pallas_kernels.sampling_truncation.sample import LOWEST, Sample
from pallas_kernels.sampling_truncation.scan_step import Brackets

GUESS, BELOW, ABOVE, CROWDED = range(4)
_TRIES = 4
"""Scans for a goal that follow the sample; later ones halve, which always ends."""
_SMALLEST_NORMAL = 1.1754944e-38
_DEVIATIONS = 3.5
"""Half the width of a bracket for a rank, in standard deviations of the sample's rank, and ..."""
_MARGIN = 6.0
"""... in ranks of the sample."""


class Options(NamedTuple):
    """A row's options as scalars."""

    k: jax.Array
    p: jax.Array
    log_min_p: jax.Array
    uses_k: jax.Array
    uses_p: jax.Array
    uses_min_p: jax.Array


class Goal(NamedTuple):
    """A threshold that is not yet known: it lies in [low, high)."""

    low: jax.Array
    high: jax.Array
    mode: jax.Array
    """GUESS: no scan looked for it. BELOW, ABOVE: it is next to `high`, next to `low`. CROWDED: no room for all."""

    @classmethod
    def anywhere(cls, low: Any) -> Goal:
        return cls(low, jnp.float32(jnp.inf), jnp.int32(GUESS))


def above(value: jax.Array) -> jax.Array:
    """The next float32 after a finite one; after 0, the smallest normal one."""
    return value + lax.max(lax.abs(value) * jnp.float32(5.9604656e-08), jnp.float32(_SMALLEST_NORMAL))


@dataclasses.dataclass(frozen=True)
class Planner:
    """Plans scans that collect about `budget` candidates of a row of `size` values."""

    sample: Sample
    options: Options
    size: int
    budget: float

    def brackets(self, floor_known: jax.Array, floor: jax.Array, goal: Goal, tries: jax.Array) -> Brackets:
        """The goal is the floor, or with `floor_known` the threshold of top-p, not below `floor`."""
        sample, options = self.sample, self.options
        per_rank = self.size / sample.size
        budget = jnp.float32(self.budget / per_rank)
        infinity, lowest = jnp.float32(jnp.inf), jnp.float32(LOWEST)
        uses_k = options.uses_k & ~floor_known
        uses_min_p = options.uses_min_p & options.uses_p & ~floor_known

        # The floor's bracket is where both of the k-th value and the threshold of min-p may lie.
        rank = jnp.where(uses_k, options.k / per_rank, infinity)
        spread = _DEVIATIONS * lax.sqrt(lax.max(rank * (1 - rank / sample.size), jnp.float32(0))) + _MARGIN
        spread = jnp.where(uses_k, spread, 0.0)
        # The true maximum may be above the sample's; the threshold of min-p then is too.
        least = jnp.where(floor_known, floor, jnp.where(uses_min_p, sample.largest + options.log_min_p, lowest))
        k_low, k_high, least_rank, kept_mass, goal_low_rank, goal_high_rank = sample.look_up(
            sample.at_rank(rank + spread),
            sample.at_rank(rank - spread),
            sample.rank_from(sample.bin_of(least)),
            sample.mass_from(sample.bin_of(least), rank),
            sample.rank_from(sample.bin_of(goal.low)),
            sample.rank_from(sample.bin_of(goal.high)),
        )
        share = jnp.where(least_rank <= budget, budget, budget / 2)
        p_rank, least_high, next_low, next_high = sample.look_up(
            sample.rank_at_mass(options.p * kept_mass),
            sample.at_rank(least_rank - share),
            sample.at_rank(goal_high_rank + budget),
            sample.at_rank(goal_low_rank - budget),
        )
        floor_low = jnp.where(uses_k, sample.low_edge(k_low), lowest)
        floor_high = jnp.where(uses_k, jnp.where(rank - spread < 1, infinity, sample.high_edge(k_high)), lowest)
        least_end = jnp.where(least_rank - share < 1, infinity, sample.high_edge(least_high))
        floor_low = jnp.where(uses_min_p, lax.max(floor_low, least), floor_low)
        floor_high = jnp.where(uses_min_p, lax.max(floor_high, least_end), floor_high)

        # The threshold of top-p gets what is left: the top of the row if it is likely there, else about the guess.
        taken = 2 * spread + jnp.where(uses_min_p & ~uses_k, share, 0.0)
        left = lax.max(budget - taken, budget / 4)
        near = p_rank <= 0.6 * left
        low_rank = jnp.where(near, left, p_rank + left / 2)
        high_rank = jnp.where(near, 0.0, p_rank - left / 2)
        p_low, p_high = sample.look_up(sample.at_rank(low_rank), sample.at_rank(high_rank))
        top_low = jnp.where(options.uses_p, sample.low_edge(p_low), infinity)
        top_high = jnp.where(options.uses_p & (high_rank >= 1), sample.high_edge(p_high), infinity)

        # Later scans look for their goal only.
        halve = (goal.mode == CROWDED) | (tries >= _TRIES)
        low = jnp.where(goal.mode == BELOW, sample.low_edge(next_low), goal.low)
        one_value = above(goal.low) >= goal.high
        low = jnp.where(halve, jnp.where(one_value, goal.low, self._middle(goal)), low)
        high = jnp.where(goal_low_rank - budget < 1, goal.high, sample.high_edge(next_high))
        high = jnp.where((goal.mode == ABOVE) & ~halve, high, goal.high)
        low = lax.max(lax.min(low, goal.high), goal.low)
        high = lax.max(lax.min(high, goal.high), above(low))
        again = (goal.mode != GUESS) | halve
        floor_low = jnp.where(floor_known, floor, jnp.where(again, low, floor_low))
        floor_high = jnp.where(floor_known, floor, jnp.where(again, high, floor_high))
        floor_high = lax.max(floor_high, jnp.where(uses_k, above(floor_low), floor_low))
        top_low = jnp.where(again & floor_known, low, top_low)
        top_high = jnp.where(again & floor_known, high, top_high)
        top_low = lax.max(top_low, floor_high)
        return Brackets(floor_low, floor_high, top_low, lax.max(top_high, top_low))

    def _middle(self, goal: Goal) -> jax.Array:
        """The float32 half way between the goal's ends; not a subnormal one, which comparisons may take for 0."""
        interpret = self.sample.cta.interpret
        low, high = ordered_scalar(goal.low, interpret), ordered_scalar(goal.high, interpret)
        middle = value_of(low + lax.shift_right_logical(high - low, jnp.uint32(1)), interpret)
        tiny = jnp.float32(_SMALLEST_NORMAL)
        instead = jnp.where(goal.low >= 0, tiny, jnp.where(goal.high > 0, 0.0, -tiny))
        return jnp.where(lax.abs(middle) < tiny, instead, middle)
