"""What a value of an fp8 KV cache means: value = stored * scale, with one scale per KV head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.validation import check_array

FP8 = jnp.dtype(jnp.float8_e4m3fn)
FP8_MAX = 448.0


def is_fp8(dtype: DTypeLike) -> bool:
    return jnp.dtype(dtype) == FP8


def check_scale(name: str, scale: jax.Array | None, num_kv_heads: int) -> None:
    """ValueError unless the scale is f32[num_kv_heads] or None."""
    if scale is not None:
        check_array(name, scale, (num_kv_heads,), jnp.float32)


def stored(x: jax.Array, scale: jax.Array | None, dtype: DTypeLike) -> jax.Array:
    """[..., KVH, D] as a cache of this dtype holds it: divided by the scale; in fp8 clipped to its largest value."""
    if scale is not None:
        x = (x.astype(jnp.float32) / scale[:, None]).astype(x.dtype)
    if is_fp8(dtype):
        x = jnp.clip(x, -FP8_MAX, FP8_MAX)
    return x.astype(dtype)


def scaled_heads(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """[T, H, D] with each query head multiplied by its KV head's scale, in the dtype of x: exact for powers of two."""
    if scale is None:
        return x
    per_head = jnp.repeat(scale, x.shape[1] // scale.shape[0])
    return (x.astype(jnp.float32) * per_head[:, None]).astype(x.dtype)
