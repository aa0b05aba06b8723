"""KV write as an XLA scatter, in place when the caches are donated."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def write_kv(
    k_cache: jax.Array, v_cache: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See api.write_kv. Values are converted to the cache's dtype before the scatter: converting it costs a copy."""
    num_blocks, _, block_size, _ = k_cache.shape
    block = jnp.where(slots >= 0, slots // block_size, num_blocks)
    offset = jnp.maximum(slots, 0) % block_size

    def scatter(cache: jax.Array, new: jax.Array) -> jax.Array:
        return cache.at[block, :, offset].set(new.astype(cache.dtype), mode="drop")

    return scatter(k_cache, k), scatter(v_cache, v)
