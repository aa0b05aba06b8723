"""Which Hopper kernels serve a step, with which configuration: the decode kernel for sequences of one token, the
prefill kernel for the others, and the simple kernel of mosaic_gpu for shapes that those two were not measured on.

Configurations are the best of the sweeps recorded in pallas_kernels/README.md, on an H200. `plan_attention` does not
call this yet: the README says what has to be measured first.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.kv_scales import is_fp8
from pallas_kernels.ragged_paged_attention.plan_decode import DecodeConfig, DecodePlan, DecodeShape, plan_decode, tiling
from pallas_kernels.ragged_paged_attention.plan_prefill import PrefillPlan, plan_prefill

#: block_tables, table_rows, cu_q_lens and kv_lens of plan_attention.
Metadata = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

_FEW_SEQUENCES = 8
_PREFILL_TILE_TOKENS = 128
_PREFILL_HEAD_DIM = 128
_F16_MAX = 65504.0


def decode_config(shape: DecodeShape, num_seqs: int, dtype: DTypeLike) -> DecodeConfig | None:
    """The configuration for up to num_seqs sequences and a cache of this dtype.

    None when the decode kernel does not serve the shape.
    """
    few = num_seqs <= _FEW_SEQUENCES
    fp8 = {
        64: {"stages": 6, "streams": 2, "converted": 2} if few else {"stages": 5, "streams": 3, "staged": 32},
        256: {"stages": 5, "columns": 64},
        128: {"stages": 7, "converted": 2, "unroll": 16} if few else {"stages": 3, "streams": 2, "staged": 32},
    }
    options = {
        64: {"stages": 5, "streams": 2} if few else {"stages": 3, "streams": 3},
        128: {"stages": 5, "staged": 128, "unroll": 32} if few else {"stages": 2, "streams": 2},
    }
    options = (fp8 if is_fp8(dtype) else options).get(shape.head_dim)
    if options is None:
        return None
    for heads in (2, 1) if few else (8, 4, 2, 1):
        config = DecodeConfig(heads=heads, **options)
        try:
            tiling(config, shape)
        except ValueError:
            continue
        return config
    return None


def plan_decodes(
    metadata: Metadata, shape: DecodeShape, sliding_windows: Sequence[int | None], dtype: DTypeLike
) -> tuple[DecodePlan, ...]:
    """One decode plan for each window; none when the decode kernel does not serve the shape.

    Args:
        metadata: block_tables, table_rows, cu_q_lens and kv_lens of plan_attention.
        shape: The step's; its window is replaced.
        sliding_windows: The distinct windows of the model's layers.
        dtype: Of the KV cache.
    """
    config = decode_config(shape, metadata[1].shape[0], dtype)
    if config is None:
        return ()
    shapes = [
        DecodeShape(
            num_tokens=shape.num_tokens,
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            block_size=shape.block_size,
            sliding_window=window,
        )
        for window in sliding_windows
    ]
    return tuple(plan_decode(*metadata, each, config) for each in shapes)


def plan_prefills(metadata: Metadata, shape: DecodeShape, num_tokens: int) -> PrefillPlan | None:
    """The prefill plan of a mixed step; None when the prefill kernel does not serve the shape."""
    if shape.head_dim != _PREFILL_HEAD_DIM:
        return None
    return plan_prefill(
        *metadata, num_tokens=num_tokens, tile_tokens=_PREFILL_TILE_TOKENS, block_size=shape.block_size, min_tokens=2
    )


def attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    decodes: tuple[DecodePlan, ...],
    prefill: PrefillPlan | None,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> jax.Array:
    """See api.ragged_paged_attention. Decode rows come first in a mixed step, so the decode kernel works on the first
    tokens alone, as many as there may be sequences.

    Raises:
        ValueError: The step was planned without this window.
    """
    from pallas_kernels.ragged_paged_attention.mosaic_decode import decode_attention
    from pallas_kernels.ragged_paged_attention.mosaic_prefill import Config, default_config, prefill_attention

    dtype = q.dtype
    if is_fp8(k_cache.dtype):
        # The kernels turn the cache into float16, which holds every e4m3 number; so must the queries be.
        q = jnp.clip(q.astype(jnp.float32), -_F16_MAX, _F16_MAX).astype(jnp.float16)
    elif q.dtype != k_cache.dtype:
        raise NotImplementedError(
            f"q is {q.dtype.name} and the KV cache {k_cache.dtype.name}; mosaic_gpu needs one dtype, xla takes both"
        )
    planned = {plan.shape.sliding_window: plan for plan in decodes}
    if sliding_window not in planned:
        raise ValueError(
            f"sliding_window is {sliding_window}; the step was planned for {list(planned)}: pass it to plan_attention"
        )
    decode = planned[sliding_window]
    rows = decode_attention(q[: decode.shape.num_tokens], k_cache, v_cache, decode, scale=scale, soft_cap=soft_cap)
    if prefill is None:
        return rows.astype(dtype)
    fp8 = is_fp8(k_cache.dtype)
    config = default_config(q.shape[-1], k_cache.dtype) if fp8 else Config(overlap=False, take_turns=False)
    output = lax.dynamic_update_slice(jnp.empty_like(q), rows, (0, 0, 0))
    output = prefill_attention(
        q,
        k_cache,
        v_cache,
        prefill,
        output,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        config=config,
    )
    return output.astype(dtype)
