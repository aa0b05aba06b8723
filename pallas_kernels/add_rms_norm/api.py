"""Residual addition and RMS norm as one op."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.add_rms_norm import xla
from pallas_kernels.implementation import (
    MOSAIC_GPU_INTERPRET,
    XLA,
    checked_implementation,
    default_norm_implementation,
)
from pallas_kernels.validation import check_array

_DTYPES = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32)))


def add_rms_norm(
    x: jax.Array,
    delta: jax.Array,
    weight: jax.Array,
    *,
    eps: float,
    layer: ArrayLike | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Adds delta to the residual stream x and normalises the sum (Zhang and Sennrich, 2019, arXiv 1910.07467).

    The sum is rounded to the dtype of x; the norm is computed in float32 from the rounded sum, and rounded once.

    Args:
        x: [T, N], bfloat16, float16 or float32.
        delta: Like x.
        weight: [N], of any of these dtypes; with `layer` [L, N].
        eps: Added to the mean square.
        layer: i32[], from 0 to L - 1: the row of weight to scale by. The kernel reads it where it is, while a slice of
            weight would be a graph of its own in a CUDA graph.
        implementation: One of IMPLEMENTATIONS; None takes the default for the device. The kernel takes multiples of
            128 up to 6144, and larger ones that warpgroups can share evenly (of 1024: to 16384); XLA does the others.

    Returns:
        (x + delta [T, N], norm(x + delta) * weight [T, N]), both in the dtype of x.

    Raises:
        ValueError: A shape or dtype is wrong.
        NotImplementedError: The implementation needs a newer JAX; "xla" does not.
    """
    check_array("x", x, (None, None))
    check_array("delta", delta, x.shape, x.dtype)
    check_array("weight", weight, x.shape[1:] if layer is None else (None, x.shape[1]))
    for name, array in (("x", x), ("weight", weight)):
        if array.dtype not in _DTYPES:
            raise ValueError(f"{name} has dtype {array.dtype.name}; wanted bfloat16, float16 or float32")
    if implementation is None:
        implementation = default_norm_implementation()
    checked_implementation(implementation)
    if layer is not None:
        layer = jnp.asarray(layer, jnp.int32)
        check_array("layer", layer, ())
    return _add_rms_norm(x, delta, weight, layer, eps=float(eps), implementation=implementation)


@functools.partial(jax.jit, static_argnames=("eps", "implementation"))
def _add_rms_norm(
    x: jax.Array, delta: jax.Array, weight: jax.Array, layer: jax.Array | None, *, eps: float, implementation: str
) -> tuple[jax.Array, jax.Array]:
    if implementation != XLA:
        from pallas_kernels.add_rms_norm import mosaic_gpu

        if x.shape[0] and mosaic_gpu.supports(x.shape[1], mosaic_gpu.itemsize_of(x, weight)):
            interpret = implementation == MOSAIC_GPU_INTERPRET
            return mosaic_gpu.add_rms_norm(x, delta, weight, layer, eps=eps, interpret=interpret)
    return xla.add_rms_norm(x, delta, weight if layer is None else weight[layer], eps=eps)
