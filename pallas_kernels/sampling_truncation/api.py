"""min-p, top-k and top-p truncation of logits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.implementation import (
    MOSAIC_GPU_INTERPRET,
    XLA,
    checked_implementation,
    default_truncation_implementation,
)
from pallas_kernels.sampling_truncation import xla
from pallas_kernels.validation import check_array


def truncate_logits(
    logits: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Sets the logits outside the kept set of each row to -inf; at least the largest logit is kept.

    vLLM's order: min_p, then top_k, then top_p, each on what the one before left, with probabilities renormalised
    over what top_k left. Sort-free: the kept set is {logit >= threshold}, and the threshold is found on the ordered
    bits of float32. Ties with the threshold are kept.

    Args:
        logits: f32[R, V], after temperature. -inf is allowed; every row needs a finite maximum.
        top_k: i32[R]; <= 0 or >= V: off.
        top_p: f32[R]; >= 1: off.
        min_p: f32[R] in [0, 1]; <= 0: off. Keeps probabilities of at least min_p times the largest.
        implementation: One of IMPLEMENTATIONS; None takes the default for the device.

    Returns:
        f32[R, V].

    Raises:
        ValueError: A shape or dtype is wrong.
        NotImplementedError: The implementation needs a newer JAX; "xla" does not.
    """
    check_array("logits", logits, (None, None), jnp.float32)
    rows = logits.shape[:1]
    check_array("top_k", top_k, rows, jnp.int32)
    check_array("top_p", top_p, rows, jnp.float32)
    check_array("min_p", min_p, rows, jnp.float32)
    if implementation is None:
        implementation = default_truncation_implementation()
    checked_implementation(implementation)
    return _truncate(logits, top_k, top_p, min_p, implementation=implementation)


@functools.partial(jax.jit, static_argnames=("implementation",))
def _truncate(
    logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array, *, implementation: str
) -> jax.Array:
    if implementation == XLA:
        return xla.truncate_logits(logits, top_k, top_p, min_p)
    from pallas_kernels.sampling_truncation import mosaic_gpu

    return mosaic_gpu.truncate_logits(logits, top_k, top_p, min_p, interpret=implementation == MOSAIC_GPU_INTERPRET)
