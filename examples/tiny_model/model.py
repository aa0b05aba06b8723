"""A small Llama in Flax NNX: fp32 parameters, matrix products in the compute dtype, tied embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

AttentionKind = Literal["xla", "cudnn"]


@dataclass(frozen=True)
class TinyConfig:
    """Shape of the model; the defaults are the bundled one's (7.3M parameters, 14.7 MB in bf16)."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 8
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 768
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


def rotary(x: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (Su et al., RoFormer, 2021) in Llama's half-split layout.

    Args:
        x: [batch, length, heads, head_dim]; position i is index i of the length axis.
        theta: Base of the frequencies.
    """
    length, dim = x.shape[1], x.shape[-1]
    frequency = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: TinyConfig, dtype: jnp.dtype, implementation: AttentionKind, *, rngs: nnx.Rngs):
        self.config = config
        self.implementation: AttentionKind = implementation
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = _linear(config.hidden_size, query, dtype, config, rngs)
        self.k_proj = _linear(config.hidden_size, key, dtype, config, rngs)
        self.v_proj = _linear(config.hidden_size, key, dtype, config, rngs)
        self.o_proj = _linear(query, config.hidden_size, dtype, config, rngs, residual=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, _ = x.shape
        q, k, v = (
            projection(x).reshape(batch, length, -1, self.config.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotary(q, self.config.rope_theta), rotary(k, self.config.rope_theta)
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=self.implementation)
        return self.o_proj(out.reshape(batch, length, -1))


class MLP(nnx.Module):
    """SwiGLU (Shazeer, GLU Variants Improve Transformer, 2020)."""

    def __init__(self, config: TinyConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.gate_proj = _linear(config.hidden_size, config.intermediate_size, dtype, config, rngs)
        self.up_proj = _linear(config.hidden_size, config.intermediate_size, dtype, config, rngs)
        self.down_proj = _linear(config.intermediate_size, config.hidden_size, dtype, config, rngs, residual=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: TinyConfig, dtype: jnp.dtype, implementation: AttentionKind, *, rngs: nnx.Rngs):
        self.input_layernorm = _norm(config, dtype, rngs)
        self.self_attn = Attention(config, dtype, implementation, rngs=rngs)
        self.post_attention_layernorm = _norm(config, dtype, rngs)
        self.mlp = MLP(config, dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyLlama(nnx.Module):
    """The whole model; attribute names follow Hugging Face's checkpoint names.

    Args:
        config: Shape.
        dtype: Compute dtype; parameters are always fp32.
        implementation: Of `jax.nn.dot_product_attention`: "xla" or "cudnn".
        rngs: For the initial parameters.
    """

    def __init__(self, config: TinyConfig, dtype: jnp.dtype, implementation: AttentionKind = "xla", *, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.normal(0.02)
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, embedding_init=init, rngs=rngs
        )
        self.layers = nnx.List([Layer(config, dtype, implementation, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = _norm(config, dtype, rngs)

    def hidden(self, token_ids: jax.Array) -> jax.Array:
        """int32 [batch, length] to the normed hidden states [batch, length, hidden] in the compute dtype."""
        x = self.embed_tokens(token_ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., hidden] to fp32 [..., vocab], through the tied embedding."""
        embedding = self.embed_tokens.embedding[...].astype(hidden.dtype)
        return jnp.einsum("...h,vh->...v", hidden, embedding, preferred_element_type=jnp.float32)

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        """int32 [batch, length] to fp32 logits [batch, length, vocab]."""
        return self.logits(self.hidden(token_ids))


def parameter_count(model: TinyLlama) -> int:
    """Number of trained scalars."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def attention_implementation() -> AttentionKind:
    """ "cudnn" where its fused attention runs forwards and backwards on the default device, else "xla" (slower)."""
    if jax.default_backend() != "gpu":
        return "xla"

    def loss(q, kv):
        out = jax.nn.dot_product_attention(q, kv, kv, is_causal=True, implementation="cudnn")
        return out.astype(jnp.float32).sum()

    q = jnp.ones((2, 256, 4, 64), jnp.bfloat16)
    try:
        jax.block_until_ready(jax.jit(jax.grad(loss, argnums=(0, 1)))(q, q[:, :, :2]))
    except Exception as error:  # whatever cuDNN, its absence or its version raises, XLA can do the work
        print(f"cuDNN attention is not available here ({type(error).__name__}: {error}); using XLA's")
        return "xla"
    return "cudnn"


def _linear(inputs: int, outputs: int, dtype, config: TinyConfig, rngs: nnx.Rngs, residual: bool = False) -> nnx.Linear:
    scale = 0.02 / (2 * config.num_layers) ** 0.5 if residual else 0.02
    init = nnx.initializers.normal(scale)
    return nnx.Linear(inputs, outputs, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)


def _norm(config: TinyConfig, dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype, rngs=rngs)
