"""Ragged paged attention for Hopper in Pallas Mosaic GPU: the launch, and what XLA does before and after the kernel.

With several splits each CTA writes a float32 partial result and its log-sum-exp, and a dense reduction over the split
axis combines them (Flash-Decoding).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import interpret_params
from pallas_kernels.ragged_paged_attention.mosaic_gpu_kernel import CHUNK_KEYS, Config, kernel
from pallas_kernels.ragged_paged_attention.plan import MOSAIC_TILE_ROWS, AttentionPlan
from pallas_kernels.ragged_paged_attention.tiles import query_tiles, tokens

_SMEM_BUDGET = 112 * 1024  # half of an SM's shared memory, so that two CTAs fit
_MAX_STAGES = 4


def attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    plan: AttentionPlan,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    interpret: bool,
) -> jax.Array:
    """See api.ragged_paged_attention; `interpret` runs the kernel on the CPU with race detection."""
    if q.dtype != k_cache.dtype:
        raise NotImplementedError(
            f"q is {q.dtype.name} and the KV cache {k_cache.dtype.name}; mosaic_gpu needs one dtype, xla takes both"
        )
    group = plan.num_q_heads // plan.num_kv_heads
    used_rows = plan.tile_tokens * group
    config = Config(
        rows=-(-used_rows // 8) * 8 if plan.decode_only else MOSAIC_TILE_ROWS,
        group=group,
        head_dim=plan.head_dim,
        block_size=plan.block_size,
        splits=plan.num_splits,
        stages=_stages(plan.head_dim, plan.num_splits),
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        zero_empty=plan.decode_only,
        interpret=interpret,
    )
    tiles = jnp.pad(query_tiles(q, plan), ((0, 0), (0, 0), (0, config.rows - used_rows), (0, 0)))
    output, *lse = _launch(config, tiles, k_cache, v_cache, plan)
    if lse:
        output = _combine(output, lse[0][..., : config.rows]).astype(q.dtype)
    return tokens(output[:, :, :used_rows], plan)


def _stages(head_dim: int, splits: int) -> int:
    """As many chunks in flight as leave room for a second CTA; 2 at head_dim 256, where one CTA fills the SM."""
    if head_dim == 256:
        return 2
    fixed = MOSAIC_TILE_ROWS * head_dim * (2 if splits == 1 else 2 + 4)
    return min(_MAX_STAGES, (_SMEM_BUDGET - fixed) // (2 * CHUNK_KEYS * head_dim * 2))


def _combine(partial: jax.Array, lse: jax.Array) -> jax.Array:
    """Weighted mean over the splits of partial [P, NT, KVH, rows, D], log2 of the weights in lse [P, NT, KVH, rows]."""
    weight = jnp.exp2(lse - jnp.max(lse, axis=0, keepdims=True))
    return jnp.sum(partial * weight[..., None], axis=0) / jnp.sum(weight, axis=0)[..., None]


def _launch(
    config: Config, q_tiles: jax.Array, k_cache: jax.Array, v_cache: jax.Array, plan: AttentionPlan
) -> list[jax.Array]:
    """Outputs [NT, KVH, rows, D], or with splits: partials f32[P, NT, KVH, rows, D] and lse f32[P, NT, KVH, 64]."""
    num_tiles, num_kv_heads = q_tiles.shape[:2]
    dtype = q_tiles.dtype
    tile_shape, kv_shape = (MOSAIC_TILE_ROWS, config.head_dim), (config.stages, CHUNK_KEYS, config.head_dim)
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
    scratch = {
        "q_smem": plgpu.SMEM(tile_shape, dtype, transforms=swizzled),
        "k_smem": plgpu.SMEM(kv_shape, dtype, transforms=swizzled),
        "v_smem": plgpu.SMEM(kv_shape, dtype, transforms=swizzled),
        "q_barrier": plgpu.Barrier(),
        "k_barriers": plgpu.Barrier(num_arrivals=config.copies, num_barriers=config.stages),
        "v_barriers": plgpu.Barrier(num_arrivals=config.copies, num_barriers=config.stages),
    }
    outputs = [jax.ShapeDtypeStruct(q_tiles.shape, dtype)]
    if config.splits > 1:
        scratch["partial_smem"] = plgpu.SMEM(tile_shape, jnp.float32)
        outputs = [
            jax.ShapeDtypeStruct((config.splits, *q_tiles.shape), jnp.float32),
            jax.ShapeDtypeStruct((config.splits, num_tiles, num_kv_heads, MOSAIC_TILE_ROWS), jnp.float32),
        ]
    launch = plgpu.kernel(
        functools.partial(kernel, config),
        out_type=outputs,
        scratch_types=scratch,
        grid=(num_kv_heads, config.splits, num_tiles),
        grid_names=("kv_head", "split", "tile"),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret_params(config.interpret),
        kernel_name="ragged_paged_attention",
    )
    return launch(plan.block_tables, plan.tile_table_row, plan.tile_len, plan.tile_pos, q_tiles, k_cache, v_cache)
