"""Dense products of the decoders."""

from __future__ import annotations

import jax
from jax import lax


def matmul(x: jax.Array, w: jax.Array, *, preferred_element_type=None) -> jax.Array:
    """x `[T, K]` @ w `[K, N]` -> `[T, N]` in the dtype of x, one plain GEMM.

    Sums are in float32 for 16-bit operands (XLA's default on CPU and GPU); float32 operands are multiplied as float32,
    not as TF32.
    """
    return contract(x, w, (1, 0), preferred_element_type=preferred_element_type)


def contract(x: jax.Array, w: jax.Array, axes: tuple[int, int], *, preferred_element_type=None) -> jax.Array:
    """Sums over axis `axes[0]` of x and `axes[1]` of w, both matrices; precision as in `matmul`."""
    precision = lax.Precision.HIGHEST if x.dtype == "float32" else None
    dimension_numbers = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(x, w, dimension_numbers, precision=precision, preferred_element_type=preferred_element_type)
