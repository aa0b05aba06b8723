"""Prefill attention for Hopper in Pallas Mosaic GPU: the launch.

A persistent CTA works through items: a query tile and some query heads of one KV head. Its compute warpgroups own 64
rows each; one more warpgroup feeds them keys and values, and the next item's queries while the last item is still
being computed.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.kv_scales import is_fp8
from pallas_kernels.mosaic import divide_registers, interpret_params
from pallas_kernels.ragged_paged_attention.mosaic_prefill_common import (
    OUTPUT_COLUMNS,
    OUTPUT_TRANSFORMS,
    WARPGROUP_ROWS,
    Config,
    Cta,
    Problem,
)
from pallas_kernels.ragged_paged_attention.mosaic_prefill_compute import Warpgroup
from pallas_kernels.ragged_paged_attention.mosaic_prefill_fp8 import produce_fp8
from pallas_kernels.ragged_paged_attention.mosaic_prefill_producer import produce
from pallas_kernels.ragged_paged_attention.plan_prefill import ROW_ALIGNMENT, PrefillPlan


def prefill_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    plan: PrefillPlan,
    output: jax.Array | None = None,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention of the plan's tokens over the paged KV cache, which already holds the step's keys and values.

    Args:
        q: [T, H, D] in the dtype of the cache, float16 for a cache of float8_e4m3fn.
        k_cache: [num_blocks, KVH, block_size, D].
        v_cache: Like k_cache.
        plan: From plan_prefill, for this step.
        output: [T, H, D], written in place under donation: the plan's tokens and the padding tokens, no other rows.
            None: a fresh array, whose other rows are undefined.
        scale, sliding_window, soft_cap: As for ragged_paged_attention; scale is positive.
        sinks: f32[H], a logit per head that takes part in the softmax and has no value; None: off.
        config: How to cut and schedule the work; the plan's tile_tokens must be its. None: default_config.
        interpret: Run on the CPU with race detection.
    """
    num_tokens, num_heads, head_dim = q.shape
    padding = -num_tokens % ROW_ALIGNMENT
    if padding:  # a bucket of a few tokens
        rows = ((0, padding), (0, 0), (0, 0))
        q = jnp.pad(q, rows)
        output = None if output is None else jnp.pad(output, rows)
    group = num_heads // k_cache.shape[1]
    config = config or default_config(head_dim, k_cache.dtype)
    _check(config, group)
    if plan.tile_tokens != config.tile_tokens:
        raise ValueError(f"the plan is for tiles of {plan.tile_tokens} tokens; the config has {config.tile_tokens}")
    if scale <= 0:
        raise ValueError(f"scale is {scale}; it must be positive")
    problem = Problem(
        group=group,
        num_heads=num_heads,
        head_dim=head_dim,
        block_size=k_cache.shape[2],
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks is not None,
        interpret=interpret,
    )
    sink_logits = jnp.zeros(1, jnp.float32) if sinks is None else sinks
    arguments = (plan.block_tables, plan.tiles, plan.num_tiles, q, k_cache, v_cache, sink_logits)
    reference = jax.new_ref(jnp.empty_like(q) if output is None else output)
    _launch(config, problem, q.dtype, k_cache.dtype)(*arguments, reference)
    return jax.freeze(reference)[:num_tokens]


def default_config(head_dim: int, cache_dtype: DTypeLike) -> Config:
    """The configuration for long chunks: the best of the sweep in pallas_kernels/README.md; at 256 what fits."""
    config = Config(tile_keys=64 if head_dim == 256 else 128)
    if is_fp8(cache_dtype):  # the producer converts, and the tiles as they arrive take shared memory
        options = {"stages": 1} if head_dim == 256 else {"registers": (216, 72)}
        config = dataclasses.replace(config, **options)
    return config


def _check(config: Config, group: int) -> None:
    rows = config.warpgroups * WARPGROUP_ROWS
    if rows % config.tile_tokens or config.tile_tokens % ROW_ALIGNMENT:
        raise ValueError(f"tile_tokens is {config.tile_tokens}; it must divide {rows} and be a multiple of 8")
    if WARPGROUP_ROWS % config.segment_rows or config.tile_tokens % config.segment_rows:
        raise ValueError(f"tile_tokens is {config.tile_tokens}; a head's rows must be whole warpgroups or divide one")
    if group % config.heads:
        raise ValueError(f"an item has {config.heads} heads; the group of {group} heads is no multiple of it")


def _launch(config: Config, problem: Problem, dtype: jnp.dtype, cache_dtype: jnp.dtype):
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
    rows_shape = (config.warpgroups, WARPGROUP_ROWS, problem.head_dim)
    kv_shape = (config.stages, config.tile_keys, problem.head_dim)
    copies = config.copies(problem.block_size)
    scratch = {
        "q_smem": plgpu.SMEM(rows_shape, dtype, transforms=swizzled),
        "k_smem": plgpu.SMEM(kv_shape, dtype, transforms=swizzled),
        "v_smem": plgpu.SMEM(kv_shape, dtype, transforms=swizzled),
        "o_smem": plgpu.SMEM(
            (*rows_shape[:2], min(problem.head_dim, OUTPUT_COLUMNS)), dtype, transforms=OUTPUT_TRANSFORMS
        ),
        "q_full": plgpu.Barrier(num_arrivals=config.segments, num_barriers=config.warpgroups),
        "q_free": plgpu.Barrier(num_barriers=config.warpgroups),
        "kv_full": plgpu.Barrier(num_arrivals=1 if is_fp8(cache_dtype) else copies, num_barriers=2 * config.stages + 1),
        "kv_free": plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=2 * config.stages),
    }
    if is_fp8(cache_dtype):
        scratch["fp8_smem"] = plgpu.SMEM((2, *kv_shape[1:]), cache_dtype)
        scratch["fp8_full"] = plgpu.Barrier(num_arrivals=copies, num_barriers=2)
    return plgpu.kernel(
        functools.partial(_kernel, config, problem),
        out_type=(),
        scratch_types=scratch,
        grid=(config.num_ctas,),
        grid_names=("cta",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            unsafe_no_auto_barriers=not problem.interpret,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret_params(problem.interpret),
        kernel_name="prefill_attention",
    )


def _kernel(config: Config, problem: Problem, tables, tiles, num_tiles, q, k, v, sinks, output, **scratch) -> None:
    """Body of one CTA."""
    cta = Cta(config, problem, tables, tiles, num_tiles, q, k, v, sinks, output, **scratch)
    warpgroup = lax.axis_index("warpgroup")
    registers = divide_registers(config.registers[0], config.warpgroups, config.registers[1])

    @pl.when(warpgroup < config.warpgroups)
    def _compute():
        plgpu.set_max_registers(registers[0], action="increase")
        Warpgroup(cta, warpgroup).compute()

    @pl.when(warpgroup == config.warpgroups)
    def _produce():
        plgpu.set_max_registers(registers[1], action="decrease")
        (produce if cta.fp8_smem is None else produce_fp8)(cta)
