"""The products as XLA makes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """See api.matmul; float32 operands are multiplied as float32, not as TF32."""
    precision = lax.Precision.HIGHEST if x.dtype == "float32" else None
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), precision=precision)


def gated_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """See api.gated_matmul; one product, both halves of which are rounded to the dtype of x."""
    depth, halves, columns = w.shape
    product = matmul(x, w.reshape(depth, halves * columns)).reshape(-1, halves, columns).astype(jnp.float32)
    return (jax.nn.silu(product[:, 0]) * product[:, 1]).astype(x.dtype)
