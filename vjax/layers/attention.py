"""Self-attention over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import pallas_kernels
from vjax.layers.linear import matmul, unsharded
from vjax.layers.param import param
from vjax.layers.vectors import LayerVectors
from vjax.models.arch import ArchConfig
from vjax.parallel.sharding import KV_CACHE_AXES, partition_spec

#: One layer's K and V cache, each `[num_blocks, num_kv_heads, block_size, cache_head_dim]`.
KVCache = tuple[jax.Array, jax.Array]
#: Scales of one layer's keys and values, each f32 `[num_kv_heads]`, or None for 1.
KVScales = tuple[jax.Array | None, jax.Array | None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionMetadata:
    """What attention needs to know about a step's flat tokens, the same for all layers."""

    #: i32 [T]: position of each token in its sequence.
    positions: jax.Array
    #: i32 [T]: block_id * block_size + offset where the token's key and value go; -1 for padding.
    slots: jax.Array
    #: From `pallas_kernels.plan_attention`, for the number of heads on one shard.
    plan: pallas_kernels.AttentionPlan
    #: i32 [Q]: the tokens that attend, in the plan's order. None: all T. Keys and values are written for all.
    queries: jax.Array | None = None


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., 2023, arXiv:2305.13245) with rope.

    qkv is one leaf `[hidden, kv_heads, group + 2, head_dim]`: for each key/value head its `group` query heads, then the
    key, then the value, so that splitting kv_heads over a mesh splits all three alike. o is
    `[kv_heads, group, head_dim, hidden]`.
    """

    def __init__(self, arch: ArchConfig, *, sliding_window: int | None, dtype, rngs: nnx.Rngs, mesh: Mesh | None):
        hidden, kv_heads, group, head_dim = arch.hidden_size, arch.num_kv_heads, arch.heads_per_kv, arch.head_dim
        self.qkv = param(
            rngs, (hidden, kv_heads, group + 2, head_dim), ("embed", "kv_heads", "heads_per_kv", "head_dim"), dtype
        )
        self.o = param(
            rngs, (kv_heads, group, head_dim, hidden), ("kv_heads", "heads_per_kv", "head_dim", "embed"), dtype
        )
        self.scale = arch.attention_scale
        self.rms_norm_eps = arch.rms_norm_eps
        self.sliding_window = sliding_window
        self.mesh = mesh

    def __call__(
        self,
        x: jax.Array,
        vectors: LayerVectors,
        kv: KVCache,
        rope: tuple[jax.Array, jax.Array],
        meta: AttentionMetadata,
    ) -> tuple[jax.Array, KVCache]:
        """x `[T, hidden]` -> `[Q, hidden]` and the cache with this step's keys and values written into it.

        Q is T, or the number of `meta.queries`.
        """
        num_tokens = x.shape[0]
        hidden, kv_heads, slices, head_dim = self.qkv.shape
        dense = unsharded(meta.plan.implementation, self.mesh)
        qkv = matmul(x, self.qkv[...].reshape(hidden, -1), dense).reshape(num_tokens, kv_heads, slices, head_dim)
        if "qkv_bias" in vectors.others:
            qkv = qkv + vectors.others["qkv_bias"]
        norms = (vectors.others["q_norm"], vectors.others["k_norm"]) if "q_norm" in vectors.others else None
        scales = vectors.others.get("k_scale"), vectors.others.get("v_scale")
        out, kv = self._attend(qkv, norms, rope, kv, meta, scales)
        out = matmul(out.reshape(out.shape[0], -1), self.o[...].reshape(-1, hidden), dense)
        return (out + vectors.others["o_bias"] if "o_bias" in vectors.others else out), kv

    def _attend(
        self,
        qkv: jax.Array,
        norms: tuple[jax.Array, jax.Array] | None,
        rope: tuple[jax.Array, jax.Array],
        kv: KVCache,
        meta: AttentionMetadata,
        scales: KVScales,
    ) -> tuple[jax.Array, KVCache]:
        attend = self._attend_shard
        if self.mesh is not None and self.mesh.size > 1:
            # A custom call cannot be partitioned by the compiler: each shard runs the kernels on its own heads.
            heads, cache = partition_spec((None, "kv_heads", None)), partition_spec(KV_CACHE_AXES)
            per_head = partition_spec(("kv_heads",))
            attend = jax.shard_map(
                attend,
                mesh=self.mesh,
                in_specs=(partition_spec((None, "kv_heads", None, None)), P(), P(), (cache, cache), P(), per_head),
                out_specs=(heads, (cache, cache)),
                check_vma=False,
            )
        return attend(qkv, norms, rope, kv, meta, scales)

    def _attend_shard(
        self,
        qkv: jax.Array,
        norms: tuple[jax.Array, jax.Array] | None,
        rope: tuple[jax.Array, jax.Array],
        kv: KVCache,
        meta: AttentionMetadata,
        scales: KVScales,
    ) -> tuple[jax.Array, KVCache]:
        """Writes k and v, then attends: tokens of one step may read each other's keys through shared blocks.

        The cache's head_dim may exceed the model's (kernels want a multiple): zeros change neither scores nor sums.
        """
        q_norm, k_norm = norms or (None, None)
        scaled = dict(zip(("k_scale", "v_scale"), scales, strict=True))
        q, k_cache, v_cache = pallas_kernels.rope_write_kv(
            qkv,
            *rope,
            *kv,
            meta.slots,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=self.rms_norm_eps,
            implementation=meta.plan.implementation,
            **scaled,
        )
        if meta.queries is not None:
            q = q[meta.queries]
        out = pallas_kernels.ragged_paged_attention(
            q, k_cache, v_cache, meta.plan, scale=self.scale, sliding_window=self.sliding_window, **scaled
        )
        return out[..., : self.qkv.shape[-1]], (k_cache, v_cache)
