"""The small parameters of all layers, stacked, so that a model has few leaves."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vjax.layers.param import param
from vjax.models.arch import ArchConfig


class LayerWeight(NamedTuple):
    """One layer's row of a parameter of all layers, for kernels that find it themselves."""

    #: `[L, ...]`.
    of_layers: jax.Array
    #: i32 `[]`.
    layer: Any


class LayerVectors(NamedTuple):
    """One layer's small parameters."""

    attention_norm: LayerWeight
    mlp_norm: LayerWeight
    #: The others by name; those that the architecture lacks are absent.
    others: dict[str, jax.Array]


class StackedVectors(nnx.Module):
    """Norms and biases of all layers, one leaf each with a leading axis of layers.

    attention_norm, mlp_norm `[L, hidden]`; with qk_norm: q_norm, k_norm `[L, head_dim]`; with qkv_bias: qkv_bias
    `[L, kv_heads, group + 2, head_dim]`; with o_bias: o_bias `[L, hidden]`; with mlp_bias: gate_up_bias `[L, 2, ffn]`
    and down_bias `[L, hidden]`. With kv_scales, for a quantised KV cache: k_scale and v_scale f32 `[L, kv_heads]`.
    """

    def __init__(self, arch: ArchConfig, *, dtype, rngs: nnx.Rngs, kv_scales: bool = False):
        def stacked(shape: tuple[int, ...], axes: tuple[str | None, ...], init: str) -> nnx.Param:
            return param(rngs, (arch.num_layers, *shape), ("layers", *axes), dtype, init)

        hidden, head = (arch.hidden_size,), (arch.head_dim,)
        self.attention_norm = stacked(hidden, ("embed",), "ones")
        self.mlp_norm = stacked(hidden, ("embed",), "ones")
        if arch.qk_norm:
            self.q_norm = stacked(head, ("head_dim",), "ones")
            self.k_norm = stacked(head, ("head_dim",), "ones")
        if arch.qkv_bias:
            shape = (arch.num_kv_heads, arch.heads_per_kv + 2, arch.head_dim)
            self.qkv_bias = stacked(shape, ("kv_heads", "heads_per_kv", "head_dim"), "normal")
        if arch.o_bias:
            self.o_bias = stacked(hidden, ("embed",), "normal")
        if arch.mlp_bias:
            self.gate_up_bias = stacked((2, arch.intermediate_size), ("gate_up", "mlp"), "normal")
            self.down_bias = stacked(hidden, ("embed",), "normal")
        if kv_scales:
            shape, axes = (arch.num_layers, arch.num_kv_heads), ("layers", "kv_heads")
            self.k_scale = param(rngs, shape, axes, jnp.float32, "ones")
            self.v_scale = param(rngs, shape, axes, jnp.float32, "ones")

    def layer(self, index: int) -> LayerVectors:
        """The parameters of one layer."""
        of_layers = nnx.to_pure_dict(nnx.state(self, nnx.Param))
        row = np.int32(index)
        return LayerVectors(
            attention_norm=LayerWeight(of_layers.pop("attention_norm"), row),
            mlp_norm=LayerWeight(of_layers.pop("mlp_norm"), row),
            others={name: jnp.asarray(value[index]) for name, value in of_layers.items()},
        )
