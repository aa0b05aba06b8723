"""The decoder that all supported architectures share: embedding, layers, final norm, head."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vjax.layers.attention import Attention, AttentionMetadata, KVCache
from vjax.layers.embedding import embed_tokens, head_logits
from vjax.layers.linear import unsharded
from vjax.layers.mlp import GatedMLP
from vjax.layers.norm import add_rms_norm, rms_norm
from vjax.layers.param import param
from vjax.layers.rope import rope_cos_sin
from vjax.layers.vectors import LayerVectors, StackedVectors
from vjax.models.arch import ArchConfig
from vjax.models.weight_rules import WeightRule

__all__ = ["Activations", "AttentionMetadata", "DecoderLayer", "DecoderModel", "KVCache"]


class Activations(NamedTuple):
    """What one layer leaves to the next."""

    #: `[T, hidden]`: the residual stream.
    x: jax.Array
    #: `[T, hidden]`: the next layer's norm of it.
    normed: jax.Array
    #: cos and sin f32 `[T, head_dim / 2]`, the same for all layers.
    rope: tuple[jax.Array, jax.Array]


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, with the addition and the norm between them.

    The norm before and the addition after them are the model's: one layer's addition and the next one's norm are one
    kernel.
    """

    def __init__(self, arch: ArchConfig, *, sliding_window: int | None, dtype, rngs: nnx.Rngs, mesh: Mesh | None):
        self.attention = Attention(arch, sliding_window=sliding_window, dtype=dtype, rngs=rngs, mesh=mesh)
        self.mlp = GatedMLP(arch, dtype=dtype, rngs=rngs)
        self.rms_norm_eps = arch.rms_norm_eps
        self.mesh = mesh

    def __call__(
        self,
        x: jax.Array,
        normed: jax.Array,
        vectors: LayerVectors,
        kv: KVCache,
        rope: tuple[jax.Array, jax.Array],
        meta: AttentionMetadata,
    ) -> tuple[jax.Array, jax.Array, KVCache]:
        """The residual stream x and attention's input `[T, hidden]` -> x, what to add to it, and the cache.

        With `meta.queries` both results are those tokens' only.
        """
        out, kv = self.attention(normed, vectors, kv, rope, meta)
        if meta.queries is not None:
            x = x[meta.queries]
        dense = unsharded(meta.plan.implementation, self.mesh)
        x, normed = add_rms_norm(x, out, vectors.mlp_norm, self.rms_norm_eps, implementation=dense)
        return x, self.mlp(normed, vectors, dense), kv


@partial(jax.jit, static_argnames=("graphdef",))
def _run_layer(graphdef: nnx.GraphDef, state: nnx.State, *args: Any) -> tuple[jax.Array, jax.Array, KVCache]:
    """One layer under an inner jit: layers with equal graphdefs are traced and lowered once."""
    return nnx.merge(graphdef, state)(*args)


class DecoderModel(nnx.Module):
    """A causal language model over flat ragged tokens and a paged KV cache.

    Subclasses are architectures: they say how config.json is read (`arch_config`) and what the checkpoint's tensors
    are called (`weight_rules`).

    Args:
        arch: The architecture.
        dtype: Dtype of parameters and activations.
        rngs: Source of the random initial weights. Under `nnx.eval_shape` nothing is allocated.
        mesh: With more than one device, attention runs per shard of the key/value heads.
        kv_scales: The KV cache is quantised with scales of the checkpoint.
    """

    weight_rules: ClassVar[tuple[WeightRule, ...]] = ()

    @staticmethod
    def arch_config(config: dict[str, Any]) -> ArchConfig:
        """The architecture of a parsed config.json; ModelLoadError names what is not supported."""
        raise NotImplementedError

    def __init__(self, arch: ArchConfig, *, dtype, rngs: nnx.Rngs, mesh: Mesh | None = None, kv_scales: bool = False):
        self.arch = arch
        self.mesh = mesh
        self.embed = param(rngs, (arch.vocab_size, arch.hidden_size), ("vocab", "embed"), dtype)
        self.layers = nnx.List(
            [
                DecoderLayer(arch, sliding_window=window, dtype=dtype, rngs=rngs, mesh=mesh)
                for window in arch.sliding_windows
            ]
        )
        self.vectors = StackedVectors(arch, dtype=dtype, rngs=rngs, kv_scales=kv_scales)
        self.norm = param(rngs, (arch.hidden_size,), ("embed",), dtype, "ones")
        if not (arch.pools or arch.tie_word_embeddings):
            self.lm_head = param(rngs, (arch.vocab_size, arch.hidden_size), ("vocab", "embed"), dtype)
        if arch.head in ("score", "score_mlp"):
            self.score = param(rngs, (arch.num_labels, arch.hidden_size), (None, "embed"), dtype)
        if arch.head == "score_mlp":
            self.score_bias = param(rngs, (arch.num_labels,), (None,), dtype)
            self.score_hidden = param(rngs, (arch.hidden_size, arch.hidden_size), (None, "embed"), dtype)
            self.score_hidden_bias = param(rngs, (arch.hidden_size,), (None,), dtype)

    def begin(self, token_ids: jax.Array, meta: AttentionMetadata) -> Activations:
        """token_ids i32 `[T]` -> what the first layer takes."""
        rope = rope_cos_sin(meta.positions, self.arch.rope, self.arch.head_dim)
        x = embed_tokens(self.embed[...], token_ids)
        normed = rms_norm(x, self.vectors.attention_norm[0], self.arch.rms_norm_eps)
        return Activations(x, normed, rope)

    def run_layers(
        self,
        activations: Activations,
        kv: tuple[KVCache, ...],
        meta: AttentionMetadata,
        last_meta: AttentionMetadata | None = None,
        *,
        first: int = 0,
    ) -> tuple[Activations, tuple[KVCache, ...]]:
        """Runs as many layers as there are caches, from layer `first` on, and returns what the next layer takes. Behind
        the last one that is x alone, the hidden states before the final norm, and `normed` is x as well.

        Args:
            last_meta: For the last layer instead of `meta`. Nothing reads what it gives for other tokens than those
                that logits are wanted of: with `queries` it computes, and the result is, theirs alone, `[Q, hidden]`.
        """
        x, normed, rope = activations
        updated = []
        for index, layer_kv in enumerate(kv, first):
            is_last = index + 1 == len(self.layers)
            layer_meta = last_meta if is_last and last_meta is not None else meta
            vectors = self.vectors.layer(index)
            x, delta, layer_kv = _run_layer(
                *nnx.split(self.layers[index]), x, normed, vectors, layer_kv, rope, layer_meta
            )
            updated.append(layer_kv)
            if is_last:
                x = normed = x + delta
            else:
                weight, eps = self.vectors.layer(index + 1).attention_norm, self.arch.rms_norm_eps
                dense = unsharded(meta.plan.implementation, self.mesh)
                x, normed = add_rms_norm(x, delta, weight, eps, implementation=dense)
        return Activations(x, normed, rope), tuple(updated)

    def __call__(
        self,
        token_ids: jax.Array,
        kv: tuple[KVCache, ...],
        meta: AttentionMetadata,
        last_meta: AttentionMetadata | None = None,
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """token_ids i32 `[T]` -> hidden states `[T, hidden]` before the final norm, and the caches, one per layer; see
        `run_layers`."""
        activations, kv = self.run_layers(self.begin(token_ids, meta), kv, meta, last_meta)
        return activations.x, kv

    def final_norm(self, hidden: jax.Array) -> jax.Array:
        """hidden `[R, hidden]` -> `[R, hidden]`."""
        return rms_norm(hidden, self.norm[...], self.arch.rms_norm_eps)

    def logits(self, hidden_normed: jax.Array) -> jax.Array:
        """Hidden states after the final norm `[R, hidden]` -> logits f32 `[R, vocab]`."""
        table = self.embed if self.arch.tie_word_embeddings else self.lm_head
        return head_logits(table[...], hidden_normed)

    def pooled_values(self, hidden_normed: jax.Array) -> jax.Array:
        """Of a model that pools: hidden states after the final norm `[R, hidden]` -> what pooling works on, f32
        `[R, arch.pooled_width]`: the states themselves, or the score head's outputs before any activation."""
        if self.arch.head == "none":
            return hidden_normed.astype(jnp.float32)
        if self.arch.head == "score":
            return head_logits(self.score[...], hidden_normed)
        inner = head_logits(self.score_hidden[...], hidden_normed) + self.score_hidden_bias[...].astype(jnp.float32)
        inner = jax.nn.relu(inner).astype(hidden_normed.dtype)
        return head_logits(self.score[...], inner) + self.score_bias[...].astype(jnp.float32)
