"""Root mean square normalisation (Zhang and Sennrich, 2019, arXiv:1910.07467), alone and after a residual addition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

import pallas_kernels
from vjax.layers.vectors import LayerWeight

#: From so many tokens on XLA adds in the product whose result `delta` is, and its norm reads the sum once: a layer of
#: Llama-3-8B takes 0.7 % less for 8,192 tokens and 1.1 % less for 16,384, and as long for 2,048.
_ADDED_IN_THE_PRODUCT = 4096


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Normalises x `[..., N]` over its last axis and scales by weight `[N]`; computed in float32."""
    wide = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * lax.rsqrt(variance + eps) * weight.astype(jnp.float32)).astype(x.dtype)


def add_rms_norm(
    x: jax.Array, delta: jax.Array, weight: LayerWeight, eps: float, *, implementation: str
) -> tuple[jax.Array, jax.Array]:
    """x and delta `[T, N]` -> x + delta and its norm, both `[T, N]`; weight is a row of `[L, N]`."""
    if x.shape[0] >= _ADDED_IN_THE_PRODUCT:
        implementation = "xla"
    return pallas_kernels.add_rms_norm(
        x, delta, weight.of_layers, layer=weight.layer, eps=eps, implementation=implementation
    )
