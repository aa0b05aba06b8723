"""A model as pure functions of a flat tuple of leaves: the form that the compiled step takes.

Flax defines the module; here it is split once, and merged again only while a step is traced.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from vjax.models.arch import ArchConfig
from vjax.models.decoder import Activations, AttentionMetadata, KVCache
from vjax.models.registry import get_model_class
from vjax.models.weight_rules import POOLING_HEAD_RULES, WeightRule

#: Leaves that the head reads, by the module's names; of `ArchConfig.head`.
_HEADS = {
    "lm": ("norm", "lm_head"),
    "none": ("norm",),
    "score": ("norm", "score"),
    "score_mlp": ("norm", "score_hidden", "score_hidden_bias", "score", "score_bias"),
}
_TIED_HEAD = ("norm", "embed")


class FunctionalModel:
    """A decoder split into structure (here) and leaves (the caller's tuple, in the order of `leaf_names`).

    Attributes:
        arch, dtype, mesh, kv_scales: As given to `build_model`.
        leaf_names: Dotted paths, e.g. "layers.0.attention.qkv".
        leaf_specs: name -> shape and dtype.
        logical_axes: name -> logical axis of each dimension (see vjax.parallel.sharding).
        initialisers: name -> "ones" or "normal".
        head_leaf_names: The leaves that `logits` takes, or of a model that pools `pooled_values`.
        weight_rules: How checkpoint tensors become the leaves.
    """

    def __init__(self, arch: ArchConfig, dtype, mesh: Mesh | None, kv_scales: bool):
        model_class = get_model_class(arch)
        abstract = nnx.eval_shape(
            lambda: model_class(arch, dtype=dtype, rngs=nnx.Rngs(0), mesh=mesh, kv_scales=kv_scales)
        )
        self._graphdef, state = nnx.split(abstract)
        self._treedef = jax.tree.structure(state)
        variables = {".".join(str(part) for part in path): variable for path, variable in nnx.to_flat_state(state)}
        self.arch = arch
        self.dtype = dtype
        self.mesh = mesh
        self.kv_scales = kv_scales
        self.leaf_names: tuple[str, ...] = tuple(
            _leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)
        )
        assert set(self.leaf_names) == set(variables)
        self.leaf_specs: dict[str, jax.ShapeDtypeStruct] = dict(
            zip(self.leaf_names, jax.tree.leaves(state), strict=True)
        )
        self.logical_axes: dict[str, tuple[str | None, ...]] = {
            name: variables[name].get_metadata("logical_axes") for name in self.leaf_names
        }
        self.initialisers: dict[str, str] = {name: variables[name].get_metadata("init") for name in self.leaf_names}
        is_tied = arch.tie_word_embeddings and not arch.pools
        self.head_leaf_names: tuple[str, ...] = _TIED_HEAD if is_tied else _HEADS[arch.head]
        self.weight_rules: tuple[WeightRule, ...] = model_class.weight_rules + POOLING_HEAD_RULES[arch.head]

    def forward(
        self,
        leaves: tuple[jax.Array, ...],
        token_ids: jax.Array,
        kv: tuple[KVCache, ...],
        meta: AttentionMetadata,
        last_meta: AttentionMetadata | None = None,
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """All leaves, token_ids i32 `[T]`, caches per layer -> hidden `[T, hidden]` before the final norm, caches.

        With `queries` in `last_meta`, the last layer's, hidden is `[Q, hidden]`.
        """
        return self._merge(leaves)(token_ids, kv, meta, last_meta)

    def begin(
        self, leaves: tuple[jax.Array, ...], token_ids: jax.Array, meta: AttentionMetadata, *, num_layers: int
    ) -> Activations:
        """The `layer_leaves` of the first layers, token_ids i32 `[T]` -> what the first layer takes."""
        return self._merge_named(self.layer_leaf_names(0, num_layers), leaves).begin(token_ids, meta)

    def run_layers(
        self,
        leaves: tuple[jax.Array, ...],
        activations: Activations,
        kv: tuple[KVCache, ...],
        meta: AttentionMetadata,
        last_meta: AttentionMetadata | None = None,
        *,
        first: int = 0,
    ) -> tuple[Activations, tuple[KVCache, ...]]:
        """Some of `forward`'s layers, as many as there are caches, from layer `first` on, with the leaves of these."""
        model = self._merge_named(self.layer_leaf_names(first, len(kv)), leaves)
        return model.run_layers(activations, kv, meta, last_meta, first=first)

    def layer_leaf_names(self, first: int, count: int) -> tuple[str, ...]:
        """The leaves of `count` layers from `first` on, and those that belong to no layer."""
        return tuple(name for name in self.leaf_names if _layer_of(name) in (None, *range(first, first + count)))

    def layer_leaves(self, leaves: tuple[jax.Array, ...], first: int, count: int) -> tuple[jax.Array, ...]:
        """Those of all leaves that `layer_leaf_names` names, in its order."""
        return self._pick(leaves, self.layer_leaf_names(first, count))

    def logits(self, head_leaves: tuple[jax.Array, ...], hidden: jax.Array) -> jax.Array:
        """Leaves of `head_leaf_names`, hidden `[R, hidden]` from `forward` -> final norm, head: f32 `[R, vocab]`."""
        model = self._head(head_leaves)
        return model.logits(model.final_norm(hidden))

    def pooled_values(self, head_leaves: tuple[jax.Array, ...], hidden: jax.Array) -> jax.Array:
        """Of a model that pools: leaves of `head_leaf_names`, hidden `[R, hidden]` from `forward` -> final norm, head:
        f32 `[R, arch.pooled_width]`."""
        model = self._head(head_leaves)
        return model.pooled_values(model.final_norm(hidden))

    def head_leaves(self, leaves: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Those of all leaves that `logits` or `pooled_values` takes, in its order."""
        return self._pick(leaves, self.head_leaf_names)

    def module(self, leaves: tuple[jax.Array, ...]) -> Any:
        """The Flax module with these leaves as its parameters."""
        return self._merge(leaves)

    def _head(self, head_leaves: tuple[jax.Array, ...]) -> Any:
        return self._merge_named(self.head_leaf_names, head_leaves)

    def _pick(self, leaves: tuple[jax.Array, ...], names: tuple[str, ...]) -> tuple[jax.Array, ...]:
        given = dict(zip(self.leaf_names, leaves, strict=True))
        return tuple(given[name] for name in names)

    def _merge_named(self, names: tuple[str, ...], leaves: tuple[Any, ...]) -> Any:
        """The module with these leaves; the others stay abstract, and nothing may touch them."""
        given = dict(zip(names, leaves, strict=True))
        return self._merge(tuple(given.get(name, self.leaf_specs[name]) for name in self.leaf_names))

    def _merge(self, leaves: tuple[Any, ...]) -> Any:
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))


def build_model(arch: ArchConfig, dtype, mesh: Mesh | None = None, *, kv_scales: bool = False) -> FunctionalModel:
    """The functional form of an architecture. Allocates nothing.

    Args:
        arch: From `arch_config_from_hf`.
        dtype: Of parameters and activations, e.g. jnp.bfloat16.
        mesh: The mesh of the executables; None or one device runs the kernels directly.
        kv_scales: The leaves include the scales of a quantised KV cache, "vectors.k_scale" and "vectors.v_scale".

    Raises:
        ModelLoadError: The architecture is not supported.
    """
    return FunctionalModel(arch, dtype, mesh, kv_scales)


def _layer_of(name: str) -> int | None:
    """Of a leaf, by its name."""
    prefix, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if prefix == "layers" else None


def _leaf_name(path: tuple[Any, ...]) -> str:
    parts = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    return ".".join(parts[:-1] if parts[-1] == "value" else parts)
