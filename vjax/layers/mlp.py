"""Gated feed-forward layer, SwiGLU (Shazeer, 2020, arXiv:2002.05202)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

import pallas_kernels
from vjax.layers.linear import matmul
from vjax.layers.param import param
from vjax.layers.vectors import LayerVectors
from vjax.models.arch import ArchConfig


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x)). gate_up is one leaf `[hidden, 2, ffn]` (0 the gate), down is `[ffn, hidden]`."""

    def __init__(self, arch: ArchConfig, *, dtype, rngs: nnx.Rngs):
        hidden, ffn = arch.hidden_size, arch.intermediate_size
        self.gate_up = param(rngs, (hidden, 2, ffn), ("embed", "gate_up", "mlp"), dtype)
        self.down = param(rngs, (ffn, hidden), ("mlp", "embed"), dtype)

    def __call__(self, x: jax.Array, vectors: LayerVectors, implementation: str) -> jax.Array:
        """x `[T, hidden]` -> `[T, hidden]`."""
        if "gate_up_bias" in vectors.others:
            hidden, two, ffn = self.gate_up.shape
            gate_up = matmul(x, self.gate_up[...].reshape(hidden, two * ffn), implementation).reshape(-1, two, ffn)
            gate_up = (gate_up + vectors.others["gate_up_bias"]).astype(jnp.float32)
            gated = (jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1]).astype(x.dtype)
        else:
            gated = pallas_kernels.gated_matmul(x, self.gate_up[...], implementation=implementation)
        out = matmul(gated, self.down[...], implementation)
        return out + vectors.others["down_bias"] if "down_bias" in vectors.others else out
