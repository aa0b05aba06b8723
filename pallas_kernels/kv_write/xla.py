"""KV write as an XLA scatter, in place when the caches are donated, and the plain form of rope."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.kv_write.new_heads import NewHeads


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


def turned_heads(new: NewHeads, head_dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [T, H, head_dim], k and v [T, KVH, head_dim], q and k normalised and rotated, zero-padded to `head_dim`."""

    def turned(x: jax.Array, norm: jax.Array | None) -> jax.Array:
        wide = x.astype(jnp.float32)
        if norm is not None:
            factor = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + jnp.float32(new.eps))
            wide = wide * factor * norm.astype(jnp.float32)
        first, second = jnp.split(wide, 2, axis=-1)
        c, s = new.cos[:, None], new.sin[:, None]
        return jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1).astype(x.dtype)

    def padded(x: jax.Array) -> jax.Array:
        extra = head_dim - x.shape[-1]
        return jnp.pad(x, ((0, 0), (0, 0), (0, extra))) if extra else x

    q, k, v = new.unpacked()
    return padded(turned(q, new.q_norm)), padded(turned(k, new.k_norm)), padded(v)
