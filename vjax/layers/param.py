"""Creation of parameters: shape, logical axes and initialiser in one place."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

#: Standard deviation of random weights.
INIT_STDDEV = 0.02


def initial_value(init: str, key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """`init` is "ones", or "normal": normal with mean 0 and INIT_STDDEV, drawn in float32."""
    if init == "ones":
        return jnp.ones(shape, dtype)
    assert init == "normal", init
    # Drawn flat: XLA takes seconds to compile the generator over several dimensions.
    flat = jax.random.normal(key, (math.prod(shape),), jnp.float32) * INIT_STDDEV
    return flat.astype(dtype).reshape(shape)


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype, init: str = "normal"
) -> nnx.Param:
    """A parameter that carries its logical axes (one per dimension) and the name of its initialiser as metadata."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(initial_value(init, rngs.params(), shape, dtype), logical_axes=axes, init=init)
