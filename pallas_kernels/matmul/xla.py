"""The product as XLA makes it."""

from __future__ import annotations

import jax
from jax import lax


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """See api.matmul; float32 operands are multiplied as float32, not as TF32."""
    precision = lax.Precision.HIGHEST if x.dtype == "float32" else None
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), precision=precision)
