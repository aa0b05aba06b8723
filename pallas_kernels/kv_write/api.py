"""Writing a step's keys and values into the paged KV cache."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.implementation import (
    MOSAIC_GPU_INTERPRET,
    XLA,
    check_mosaic_cache,
    checked_implementation,
    default_implementation,
)
from pallas_kernels.kv_scales import check_scale, stored
from pallas_kernels.kv_write import xla
from pallas_kernels.validation import check_array, check_caches


def write_kv(
    k_cache: jax.Array,
    v_cache: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes token t's key and value at slots[t] = block_id * block_size + offset; a negative slot skips the token.

    In place when the caller donates the caches: the compiled step holds no copy, convert or transpose of a cache
    (on the CPU for float32 caches; XLA's CPU scatter of bfloat16 converts the whole cache). Slots that are written
    must be distinct and below num_blocks * block_size.

    Args:
        k_cache: [num_blocks, KVH, block_size, D].
        v_cache: Like k_cache.
        k: [T, KVH, D], converted to the dtype of the cache; to float8_e4m3fn it saturates.
        v: Like k.
        slots: i32[T].
        k_scale: f32[KVH], the cache holds k / k_scale; None: 1.
        v_scale: The same for v.
        implementation: One of IMPLEMENTATIONS; None takes the default for the device.

    Returns:
        The new (k_cache, v_cache).

    Raises:
        ValueError: A shape or dtype is wrong.
        NotImplementedError: The implementation cannot serve this head dim or dtype; "xla" can.
    """
    check_caches(k_cache, v_cache)
    _, num_kv_heads, _, head_dim = k_cache.shape
    check_array("slots", slots, (None,), jnp.int32)
    check_array("k", k, (slots.shape[0], num_kv_heads, head_dim))
    check_array("v", v, k.shape, k.dtype)
    if implementation is None:
        implementation = default_implementation(k_cache.dtype, head_dim)
    if checked_implementation(implementation) != XLA:
        check_mosaic_cache(k_cache.dtype, head_dim)
    check_scale("k_scale", k_scale, num_kv_heads)
    check_scale("v_scale", v_scale, num_kv_heads)
    return _write_kv(k_cache, v_cache, k, v, slots, k_scale, v_scale, implementation=implementation)


@functools.partial(jax.jit, static_argnames=("implementation",))
def _write_kv(
    k_cache: jax.Array,
    v_cache: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    *,
    implementation: str,
) -> tuple[jax.Array, jax.Array]:
    k, v = stored(k, k_scale, k_cache.dtype), stored(v, v_scale, v_cache.dtype)
    if implementation == XLA:
        return xla.write_kv(k_cache, v_cache, k, v, slots)
    from pallas_kernels.kv_write import mosaic_registers

    return mosaic_registers.write_kv(k_cache, v_cache, k, v, slots, interpret=implementation == MOSAIC_GPU_INTERPRET)
