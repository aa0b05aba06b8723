"""The candidates that a scan left in shared memory, and the exact search among them.

The search is a radix selection on the ordered bits of float32: a round of it adds the weights of the candidates in the
current range to a histogram, finds the bin where the sum from the top reaches the target, and goes on in that bin.
Weights are integers: 1 to count, masses in fixed point.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import load
from pallas_kernels.sampling_truncation.cta import ADD, LANE_LAYOUT, MAX, Cta, splat
from pallas_kernels.sampling_truncation.histogram import Histogram
from pallas_kernels.sampling_truncation.ordered import ordered, ordered_scalar, value_of
from pallas_kernels.sampling_truncation.row_scan import Scan
from pallas_kernels.sampling_truncation.scan_step import weight

_ROWS_AT_ONCE = 4
_FIXED_POINT = 2.0**29
"""The sum of the masses in a range; sums of 32 bits have room for its rounding."""
_ROUNDING = 2e-5
"""Relative error that sums of masses in float32 surely stay below."""
_TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Values in shared memory: thread t owns column t, of which it uses the first rows."""

    values: Any
    """f32[slots, threads]; slots a multiple of 4."""
    scan: Scan
    histogram: Histogram

    @property
    def _cta(self) -> Cta:
        return self.histogram.cta

    def mass(self, low: jax.Array, high: jax.Array, reference: jax.Array) -> jax.Array:
        """The mass of the candidates in [low, high)."""

        def add(total: jax.Array, values: jax.Array) -> jax.Array:
            return total + jnp.where((values >= low) & (values < high), weight(values, reference), 0.0)

        (mass,) = self._cta.reduce([self._fold(add, splat(0.0))], [ADD])
        return mass

    def select_count(self, low: jax.Array, high: jax.Array, count_high: jax.Array, k: jax.Array) -> jax.Array:
        """The largest t in [low, high) such that at least k values are not below it; count_high are not below high."""
        ones = splat(1, dtype=jnp.int32)
        return self._select(low, high, lambda _: ones, (k - count_high).astype(jnp.int32))

    def select_mass(
        self,
        low: jax.Array,
        high: jax.Array,
        mass_low: jax.Array,
        mass_high: jax.Array,
        target: jax.Array,
        reference: jax.Array,
    ) -> jax.Array:
        """The same for masses; the candidates in [low, high) weigh mass_low - mass_high."""
        most = (mass_low - mass_high) + mass_low * _ROUNDING
        scale = _FIXED_POINT / lax.max(most, jnp.float32(_TINY))

        def fixed(values: jax.Array) -> jax.Array:
            return (weight(values, reference) * scale + 0.5).astype(jnp.int32)

        missing = lax.max(((target - mass_high) * scale).astype(jnp.int32), jnp.int32(1))
        return self._select(low, high, fixed, missing)

    def _select(
        self, low: jax.Array, high: jax.Array, weights: Callable[[jax.Array], jax.Array], target: jax.Array
    ) -> jax.Array:
        """The largest t in [low, high) with a sum of at least the target from t to high; `low` if there is none."""
        cta, histogram = self._cta, self.histogram
        low_bits = ordered_scalar(low, cta.interpret)
        one, zero = jnp.uint32(1), jnp.uint32(0)

        def narrow(state: tuple) -> tuple:
            start, size, missing = state
            # As many low bits of the offset are ignored as leave one bin for each of the others.
            bits = 32 - lax.clz(size - one).astype(jnp.int32)
            shift = lax.max(bits - (histogram.bins.bit_length() - 1), jnp.int32(0)).astype(jnp.uint32)

            def add(_: None, values: jax.Array) -> None:
                offset = ordered(values) - low_bits - start
                bins = lax.shift_right_logical(offset, jnp.broadcast_to(shift, offset.shape)).astype(jnp.int32)
                histogram.add(jnp.where(offset < size, bins, -1), weights(values))

            self._fold(add, None)
            (sums,) = cta.sums_from([histogram.take()])
            reached, above = splat(-1, dtype=jnp.int32), splat(0, dtype=jnp.int32)
            for total, number in zip(sums, histogram.numbers, strict=True):
                enough = total >= missing
                reached = lax.max(reached, jnp.where(enough, number, -1))
                above = lax.max(above, jnp.where(enough, 0, total))
            found, above_found = cta.reduce([reached, above], [MAX, MAX])
            inside = found >= 0
            offset = lax.shift_left(lax.max(found, jnp.int32(0)).astype(jnp.uint32), shift)
            return (
                jnp.where(inside, start + offset, start),
                jnp.where(inside, lax.shift_left(one, shift), one),
                missing - above_found,
            )

        size = ordered_scalar(high, cta.interpret) - low_bits
        start, _, _ = lax.while_loop(lambda state: state[1] > one, narrow, (zero, size, target))
        return value_of(low_bits + start, cta.interpret)

    def _fold(self, function: Callable, carry: Any) -> Any:
        """Folds over f32[THREADS] of this warpgroup's candidates; unused places are -inf."""
        used = lax.min(self.scan.most, jnp.int32(self.values.shape[0]))

        def rows(i: Any, carry: Any) -> Any:
            for j in range(_ROWS_AT_ONCE):
                row = i * _ROWS_AT_ONCE + j
                values = load(self.values.at[row, self._cta.columns], LANE_LAYOUT)
                carry = function(carry, jnp.where(self.scan.counts > row, values, -jnp.inf))
            return carry

        return lax.fori_loop(0, lax.div(used + (_ROWS_AT_ONCE - 1), _ROWS_AT_ONCE), rows, carry)
