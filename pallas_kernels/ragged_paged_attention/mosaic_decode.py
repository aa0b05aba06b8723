"""Decode attention for Hopper in Pallas Mosaic GPU: the launches.

What bounds it, on an H200 (reads 4.46 TB/s: 34 bytes/ns for each of 132 SMs), at 32/8 heads, head dim 128:
- Memory: a read takes about 1 us under load, so an SM needs 34 KB in flight. The rings hold 128 to 192 KB: a warpgroup
  may be 3 to 4 us late, at the border of an item for example, before memory waits for it.
- Copies: with 8 heads to an item a block of 16 keys is one TMA of 32 KB, not 8 of 4 KB, each of which costs 128
  arrivals at a barrier.
- Arithmetic: a tile of 128 columns is 64 KB of K and V, 1.9 us of the SM's memory. It takes 16 wgmmas of 64 cycles
  and about 500 instructions a warp: 1.1 to 1.3 us when nothing overlaps. Head dim 64 has half the bytes for the same
  softmax, and needs two streams.
- Balance: the streams differ by one tile, of 4 at one sequence of 8k keys, of 124 at 256 of 1k.
- Pieces: a stream cuts at most two items. At 132 streams those are 264 x 32 rows x 512 bytes, 4 MB, with 8 heads to an
  item and 1 MB with 2, which is why few sequences take 2.
- One sequence: launch, three dependent reads (stream, block table, block), 1 us for the last tile, 1 us to write a
  piece, and the second kernel, 3 us, come on top of 8 us for the bytes of 8k keys.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.kv_scales import is_fp8
from pallas_kernels.mosaic import interpret_params
from pallas_kernels.ragged_paged_attention.mosaic_decode_combine import combine
from pallas_kernels.ragged_paged_attention.mosaic_decode_kernel import kernel
from pallas_kernels.ragged_paged_attention.mosaic_decode_tile import LOG2E, Kernel
from pallas_kernels.ragged_paged_attention.plan_decode import TILE_ROWS, DecodePlan, num_slots, tiling


def decode_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    plan: DecodePlan,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    zero_padding: bool = True,
    interpret: bool = False,
) -> jax.Array:
    """Attention of the sequences of a decode plan; see api.ragged_paged_attention for the arguments.

    Args:
        q: [T, H, D] in the dtype of the cache, float16 for a cache of float8_e4m3fn.
        k_cache: [num_blocks, KVH, block_size, D].
        v_cache: Like k_cache.
        plan: From plan_decode.
        scale: Factor of the scores.
        soft_cap: As in the API.
        sinks: f32[H] or None: logits that take part in each head's softmax without a value.
        zero_padding: Zeros for padding tokens; then the plan must have every sequence. False: what tokens get that the
            plan has not is undefined.
        interpret: Run on the CPU with race detection.
    """
    shape, config, tiles = plan.shape, plan.config, tiling(plan.config, plan.shape)
    head_dim = shape.head_dim
    used, pad = config.heads * shape.group_size, tiles.token_rows - config.heads * shape.group_size

    def rows(x: jax.Array) -> jax.Array:
        """[T, groups, token_rows, D] of [T, H, D]."""
        x = x.reshape(-1, tiles.groups, used, head_dim)
        return jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))) if pad else x

    static = Kernel(config, shape, tiles, scale, soft_cap, interpret)
    boxes = (-1, tiles.box_rows, head_dim)
    arguments = [plan.streams, plan.seqs, plan.block_tables, rows(q), k_cache.reshape(boxes), v_cache.reshape(boxes)]
    if sinks is not None:
        logits = jnp.pad(sinks.reshape(tiles.groups, used) * LOG2E, ((0, 0), (0, pad)))
        repeats = -(-TILE_ROWS // tiles.token_rows)
        arguments.append(jnp.tile(logits, (1, repeats))[:, :TILE_ROWS].astype(jnp.float32))
    out, partial, lse = _launch(static, arguments, sinks is not None)
    target = jax.new_ref(out)
    combine(plan, tiles, partial, lse, target, zero_padding=zero_padding, interpret=interpret)
    return jax.freeze(target)[:, :, :used].reshape(q.shape)


def _launch(static: Kernel, arguments: list[Any], has_sinks: bool) -> list[jax.Array]:
    """Runs the kernel: [output, partial, lse]; see combine."""
    config, shape, tiles = static.config, static.shape, static.tiles
    q = arguments[3]
    pieces = num_slots(config, tiles, arguments[1].shape[0])
    piece_rows = max(shape.max_q_len, tiles.sharing) * tiles.token_rows
    outputs = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((pieces, piece_rows, shape.head_dim), jnp.float32),
        jax.ShapeDtypeStruct((pieces, TILE_ROWS), jnp.float32),
    ]
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
    slots, tile = config.streams * config.stages, (config.columns, shape.head_dim)
    cache_dtype = arguments[4].dtype
    scratch = {
        "q_smem": plgpu.SMEM((config.streams, TILE_ROWS, shape.head_dim), q.dtype, transforms=swizzled),
        "q_barriers": plgpu.Barrier(num_arrivals=shape.max_q_len, num_barriers=config.streams),
        "ring": plgpu.SMEM((slots, *tile), cache_dtype, transforms=() if is_fp8(cache_dtype) else swizzled),
        "full": plgpu.Barrier(num_arrivals=tiles.boxes, num_barriers=slots),
        "empty": plgpu.Barrier(num_barriers=slots),
        "staged": plgpu.SMEM((config.streams, TILE_ROWS, min(config.staged, shape.head_dim)), jnp.float32),
    }

    if tiles.sharing > 1:
        scratch["prefix_barriers"] = plgpu.Barrier(num_arrivals=tiles.sharing, num_barriers=config.streams)
    if is_fp8(cache_dtype):
        scratch["converted"] = plgpu.SMEM((config.streams * config.converted, *tile), q.dtype, transforms=swizzled)

    def body(streams, seqs, tables, q_gmem, k_gmem, v_gmem, *refs, **scratch) -> None:
        sinks, *refs = refs if has_sinks else (None, *refs)
        out, partial, lse = refs
        kernel(static, streams, seqs, tables, q_gmem, k_gmem, v_gmem, sinks, out, partial, lse, **scratch)

    launch = plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=config.streams + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            unsafe_no_auto_barriers=not static.interpret,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret_params(static.interpret),
        kernel_name="decode_attention",
    )
    return list(launch(*arguments))
