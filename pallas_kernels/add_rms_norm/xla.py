"""Residual addition and RMS norm as XLA makes them of plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def add_rms_norm(x: jax.Array, delta: jax.Array, weight: jax.Array, *, eps: float) -> tuple[jax.Array, jax.Array]:
    """See api.add_rms_norm."""
    total = x + delta
    wide = total.astype(jnp.float32)
    factor = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + jnp.float32(eps))
    return total, (wide * factor * weight.astype(jnp.float32)).astype(x.dtype)
