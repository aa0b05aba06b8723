"""Prefill attention for Hopper in Pallas Mosaic GPU: the launch."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention.mosaic_prefill_kernel import WARPGROUP_ROWS, Config, Problem, kernel
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
    config: Config = Config(),
    interpret: bool = False,
) -> jax.Array:
    """Causal attention of the plan's tokens over the paged KV cache, which already holds the step's keys and values.

    Args:
        q: [T, H, D], T a multiple of 8.
        k_cache: [num_blocks, KVH, block_size, D].
        v_cache: Like k_cache.
        plan: From plan_prefill, for this step and config.tile_tokens.
        output: [T, H, D], written in place under donation: the plan's tokens and the padding tokens, no other rows.
            None: a fresh array, whose other rows are undefined.
        scale, sliding_window, soft_cap: As for ragged_paged_attention; scale is positive.
        sinks: f32[H], a logit per head that takes part in the softmax and has no value; None: off.
        config: How to cut and schedule the work.
        interpret: Run on the CPU with race detection.
    """
    num_tokens, num_heads, head_dim = q.shape
    group = num_heads // k_cache.shape[1]
    _check(config, group, num_tokens)
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
    _launch(config, problem, q.dtype)(*arguments, reference)
    return jax.freeze(reference)


import os
INLINE=os.environ.get('INLINE','ignore')
from pallas_kernels.mosaic import interpret_params

def _check(config: Config, group: int, num_tokens: int) -> None:
    rows = config.warpgroups * WARPGROUP_ROWS
    if rows % config.tile_tokens or config.tile_tokens % ROW_ALIGNMENT:
        raise ValueError(f"tile_tokens is {config.tile_tokens}; it must divide {rows} and be a multiple of 8")
    if WARPGROUP_ROWS % config.segment_rows or config.tile_tokens % config.segment_rows:
        raise ValueError(f"tile_tokens is {config.tile_tokens}; a head's rows must be whole warpgroups or divide one")
    if group % config.heads:
        raise ValueError(f"an item has {config.heads} heads; the group of {group} heads is no multiple of it")
    if num_tokens % ROW_ALIGNMENT:
        raise NotImplementedError(f"there are {num_tokens} tokens; the kernel needs a multiple of {ROW_ALIGNMENT}")


def _launch(config: Config, problem: Problem, dtype: jnp.dtype):
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
    rows_shape = (config.warpgroups, WARPGROUP_ROWS, problem.head_dim)
    kv_shape = (config.stages, config.tile_keys, problem.head_dim)
    copies = config.copies(problem.block_size)
    segments = WARPGROUP_ROWS // config.segment_rows
    scratch = {
        "q_smem": plgpu.SMEM(rows_shape, dtype, transforms=swizzled),
        "k_smem": plgpu.SMEM(kv_shape, dtype, transforms=swizzled),
        "v_smem": plgpu.SMEM(kv_shape, dtype, transforms=swizzled),
        "o_smem": plgpu.RefUnion(
            plgpu.SMEM(rows_shape, dtype, transforms=swizzled),
            plgpu.SMEM(rows_shape, dtype),
        ),
        "q_full": plgpu.Barrier(num_arrivals=segments, num_barriers=config.warpgroups),
        "q_free": plgpu.Barrier(num_barriers=config.warpgroups),
        "k_full": plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages),
        "k_free": plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
        "v_full": plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages + 1),
        "v_free": plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
    }
    return plgpu.kernel(
        functools.partial(kernel, config, problem),
        out_type=(),
        scratch_types=scratch,
        grid=(config.num_ctas,),
        grid_names=("cta",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=0, unsafe_no_auto_barriers=not problem.interpret
        ),
        interpret=_interpret_params() if problem.interpret else None,
        kernel_name="prefill_attention",
    )


def _interpret_params():
    """The named barriers of the turns only make waits; the interpreter passes over them."""
    return dataclasses.replace(interpret_params(True), inline_mgpu=INLINE)
