"""Matrix products of a step's tokens with a weight."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.implementation import MOSAIC_GPU, checked_implementation, default_norm_implementation
from pallas_kernels.matmul import xla
from pallas_kernels.validation import check_array

_DTYPES = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16)))


def matmul(x: jax.Array, w: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """x @ w, summed in float32 and rounded once to the dtype of x.

    "mosaic_gpu" is a kernel where this device's file in `tuned/` has found one that is faster than XLA's product, and
    XLA's product elsewhere.

    Args:
        x: [M, K].
        w: [K, N], in the dtype of x.
        implementation: One of IMPLEMENTATIONS; None takes the default for the device.

    Raises:
        ValueError: A shape or dtype is wrong.
        NotImplementedError: The implementation needs a newer JAX; "xla" does not.
    """
    check_array("x", x, (None, None))
    check_array("w", w, (x.shape[1], None), x.dtype)
    if implementation is None:
        implementation = default_norm_implementation()
    return _matmul(x, w, implementation=checked_implementation(implementation))


def gated_matmul(x: jax.Array, w: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """silu(x @ w[:, 0]) * (x @ w[:, 1]), the first half of SwiGLU (Shazeer, 2020, arXiv:2002.05202), in the dtype of x.

    Sums and silu are in float32. "mosaic_gpu" is a kernel that rounds once, where this device's file in `tuned/` has
    found one that is faster than XLA's product; that rounds both products before it multiplies them.

    Args:
        x: [M, K].
        w: [K, 2, N], the gate first, in the dtype of x.
        implementation: As for `matmul`.

    Raises:
        ValueError: A shape or dtype is wrong.
        NotImplementedError: The implementation needs a newer JAX; "xla" does not.
    """
    check_array("x", x, (None, None))
    check_array("w", w, (x.shape[1], 2, None), x.dtype)
    if implementation is None:
        implementation = default_norm_implementation()
    return _gated_matmul(x, w, implementation=checked_implementation(implementation))


@functools.partial(jax.jit, static_argnames=("implementation",))
def _matmul(x: jax.Array, w: jax.Array, *, implementation: str) -> jax.Array:
    if implementation == MOSAIC_GPU and x.dtype in _DTYPES:
        from pallas_kernels.matmul import mosaic_gpu

        config = mosaic_gpu.tuned_config(x.shape[0], x.shape[1], w.shape[1])
        if config is not None:
            return mosaic_gpu.matmul(x, w, config, interpret=False)
    return xla.matmul(x, w)


@functools.partial(jax.jit, static_argnames=("implementation",))
def _gated_matmul(x: jax.Array, w: jax.Array, *, implementation: str) -> jax.Array:
    if implementation == MOSAIC_GPU and x.dtype in _DTYPES:
        from pallas_kernels.matmul import mosaic_gpu

        config = mosaic_gpu.tuned_config(x.shape[0], x.shape[1], w.shape[2], gated=True)
        if config is not None:
            return mosaic_gpu.gated_matmul(x, w, config, interpret=False)
    return xla.gated_matmul(x, w)
