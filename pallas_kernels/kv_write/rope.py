"""Head norm, rotary position embedding and the KV write as one op."""

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
from pallas_kernels.kv_write.new_heads import Heads, NewHeads
from pallas_kernels.validation import check_array, check_caches


def rope_write_kv(
    qkv: Heads,
    cos: jax.Array,
    sin: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    slots: jax.Array,
    *,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    eps: float = 1e-6,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotates a step's queries and keys and writes keys and values at slots[t] = block_id * block_size + offset.

    With norms, each head of q and k is first divided by its root mean square and multiplied by the norm's weights, as
    in Qwen3. Rope is Su et al., 2021 (arXiv 2104.09864), with the two halves of a head rotated against each other. All
    of it in float32, rounded once. The caches are updated in place when the caller donates them; slots as in write_kv.

    Args:
        qkv: [T, KVH, G + 2, D], for each KV head its G query heads, then its key, then its value; or (q, k, v) as
            [T, H, D], [T, KVH, D] and [T, KVH, D]. One dtype.
        cos: f32[T, D / 2].
        sin: f32[T, D / 2].
        k_cache: [num_blocks, KVH, block_size, DC] with DC >= D; what is wider is filled with zeros.
        v_cache: Like k_cache.
        slots: i32[T]; negative: neither key nor value are written (the query is still rotated).
        q_norm: [D], or None.
        k_norm: [D]; given if and only if q_norm is.
        eps: Added to the mean square.
        k_scale: f32[KVH], the cache holds keys / k_scale; None: 1.
        v_scale: The same for values.
        implementation: One of IMPLEMENTATIONS; None takes the default for the device.

    Returns:
        (q [T, H, DC] in the dtype of qkv, new k_cache, new v_cache).

    Raises:
        ValueError: A shape or dtype is wrong.
        NotImplementedError: The implementation cannot serve this cache; "xla" can.
    """
    new = NewHeads(qkv, cos, sin, q_norm, k_norm, float(eps))
    _check(new, k_cache, v_cache, slots)
    if implementation is None:
        implementation = default_implementation(k_cache.dtype, k_cache.shape[3])
    if checked_implementation(implementation) != XLA:
        check_mosaic_cache(k_cache.dtype, k_cache.shape[3])
    check_scale("k_scale", k_scale, k_cache.shape[1])
    check_scale("v_scale", v_scale, k_cache.shape[1])
    return _rope_write_kv(new, k_cache, v_cache, slots, k_scale, v_scale, implementation=implementation)


def _check(new: NewHeads, k_cache: jax.Array, v_cache: jax.Array, slots: jax.Array) -> None:
    check_caches(k_cache, v_cache)
    _, num_kv_heads, _, cache_head_dim = k_cache.shape
    check_array("slots", slots, (None,), jnp.int32)
    num_tokens = slots.shape[0]
    if isinstance(new.qkv, tuple):
        q, k, v = new.qkv
        check_array("q", q, (num_tokens, None, None))
        head_dim = q.shape[2]
        check_array("k", k, (num_tokens, num_kv_heads, head_dim), q.dtype)
        check_array("v", v, k.shape, q.dtype)
    else:
        check_array("qkv", new.qkv, (num_tokens, num_kv_heads, None, None))
        head_dim = new.qkv.shape[3]
        if new.qkv.shape[2] < 3:
            raise ValueError(
                f"qkv has shape {list(new.qkv.shape)}; its third dimension is query heads + 2, so at least 3"
            )
    if head_dim > cache_head_dim or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; it must be even and at most the cache's {cache_head_dim}")
    for name, array in (("cos", new.cos), ("sin", new.sin)):
        check_array(name, array, (num_tokens, head_dim // 2), jnp.float32)
    if (new.q_norm is None) != (new.k_norm is None):
        raise ValueError("one of q_norm and k_norm is None; give both or neither")
    for name, norm in (("q_norm", new.q_norm), ("k_norm", new.k_norm)):
        if norm is not None:
            check_array(name, norm, (head_dim,))


@functools.partial(jax.jit, static_argnames=("implementation",))
def _rope_write_kv(
    new: NewHeads,
    k_cache: jax.Array,
    v_cache: jax.Array,
    slots: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    *,
    implementation: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    heads = new.qkv[0] if isinstance(new.qkv, tuple) else new.qkv
    interpret = implementation == MOSAIC_GPU_INTERPRET
    scaled = k_scale is not None or v_scale is not None
    if implementation == XLA or heads.dtype != k_cache.dtype or heads.shape[-1] != k_cache.shape[-1] or scaled:
        # Not worth a kernel: XLA rotates, pads and converts, the kernel writes.
        q, k, v = xla.turned_heads(new, k_cache.shape[-1])
        k, v = stored(k, k_scale, k_cache.dtype), stored(v, v_scale, v_cache.dtype)
        if implementation == XLA:
            return q, *xla.write_kv(k_cache, v_cache, k, v, slots)
        from pallas_kernels.kv_write import mosaic_registers

        return q, *mosaic_registers.write_kv(k_cache, v_cache, k, v, slots, interpret=interpret)
    from pallas_kernels.kv_write import mosaic_rope

    return mosaic_rope.rope_write_kv(new, k_cache, v_cache, slots, interpret=interpret)
