"""Sampling truncation in plain XLA: bisection for a threshold on the ordered bits of the logits, 32 reductions each.

Ordered bits: a bijection of float32 to uint32 that keeps the order, so that the largest threshold that satisfies a
monotone predicate is found bit by bit, exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

_SIGN = 0x80000000


def truncate_logits(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """See api.truncate_logits."""
    bits = ordered_bits(logits)
    maximum = jnp.max(logits, axis=-1, keepdims=True)
    threshold = ordered_bits(min_p_threshold(maximum, min_p[:, None]))

    def with_top_k(threshold: jax.Array) -> jax.Array:
        k = top_k[:, None]
        found = _largest(lambda t: jnp.sum(bits >= t, axis=-1, keepdims=True, dtype=jnp.int32) >= k, threshold)
        return jnp.where(k > 0, jnp.maximum(found, threshold), threshold)

    def with_top_p(threshold: jax.Array) -> jax.Array:
        mass = jnp.exp(logits - maximum)
        p = top_p[:, None]

        def mass_from(t: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(bits >= t, mass, 0.0), axis=-1, keepdims=True)

        wanted = p * mass_from(threshold)
        found = _largest(lambda t: (mass_from(t) >= wanted) & (t <= ordered_bits(maximum)), threshold)
        return jnp.where(p < 1, jnp.maximum(found, threshold), threshold)

    threshold = lax.cond(jnp.any(top_k > 0), with_top_k, lambda t: t, threshold)
    threshold = lax.cond(jnp.any(top_p < 1), with_top_p, lambda t: t, threshold)
    return jnp.where(bits >= threshold, logits, -jnp.inf)


def ordered_bits(values: jax.Array) -> jax.Array:
    """uint32 that compare like the float32 values; both zeros give the same bits."""
    bits, sign = lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32), jnp.uint32(_SIGN)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def min_p_threshold(maximum: jax.Array, min_p: jax.Array) -> jax.Array:
    """The logit of a token whose probability is min_p times the largest one; -inf where min_p <= 0."""
    return jnp.where(min_p > 0, maximum + jnp.log(jnp.maximum(min_p, 1e-38)), -jnp.inf)


def _largest(holds: Callable[[jax.Array], jax.Array], like: jax.Array) -> jax.Array:
    """The largest uint32 per row for which the predicate holds; it must hold for 0 and be monotone."""

    def step(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (jnp.uint32(_SIGN) >> i.astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, found)

    return lax.fori_loop(0, 32, step, jnp.zeros_like(like))
