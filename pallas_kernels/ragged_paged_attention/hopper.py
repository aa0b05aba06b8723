"""Which Hopper kernels serve a step, with which configuration: the decode kernel for sequences of few tokens, the
prefill kernel for the others.

Configurations are the best of the sweeps recorded in pallas_kernels/README.md, on an H200; `tuned/` overrides those of
the decode kernel where it has a near case.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import tuning
from pallas_kernels.kv_scales import is_fp8
from pallas_kernels.ragged_paged_attention.plan_decode import (
    TILE_ROWS,
    DecodeConfig,
    DecodePlan,
    DecodeShape,
    plan_decode,
    tiling,
)
from pallas_kernels.ragged_paged_attention.plan_prefill import PrefillPlan, plan_prefill

#: block_tables, table_rows, cu_q_lens and kv_lens of plan_attention.
Metadata = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

DECODE_KERNEL = "decode_attention"
"""Its name in the files of `tuned/`."""

# A sequence alone is cut into some thirty pieces, whose second kernel loads them at once; eight into five each.
_LONE_SEQUENCES, _FEW_SEQUENCES = 2, 32
_FEW_FP8_SEQUENCES, _SOME_FP8_SEQUENCES = 4, 16
_MIN_SHARING_SEQUENCES = 16  # comparing tables takes 6 us a step, which eight sequences that share nothing would notice
_F16_MAX = 65504.0
_INTERPRETED_CTAS = 2  # the interpreter runs a thread for each of their warpgroups


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HopperPlan:
    """The work of one step.

    Attributes:
        decodes: One plan for each sliding window of the model's layers.
        prefill: Of the sequences that the decode kernel does not take; None when it takes all of them.
        interpret: The kernels run on the CPU, static.
    """

    decodes: tuple[DecodePlan, ...]
    prefill: PrefillPlan | None
    interpret: bool = dataclasses.field(metadata={"static": True})


def decode_config(shape: DecodeShape, num_seqs: int, dtype: DTypeLike) -> DecodeConfig:
    """The configuration for up to num_seqs sequences and a cache of this dtype: of the nearest tuned case, or
    default_decode_config's.

    Raises:
        NotImplementedError: No configuration fits.
    """
    exact, sizes = decode_case(shape, num_seqs, dtype)
    default = functools.partial(default_decode_config, shape, num_seqs, dtype)
    return tuning.lookup(DECODE_KERNEL, DecodeConfig, exact, sizes, default)


def decode_case(
    shape: DecodeShape, num_seqs: int, dtype: DTypeLike
) -> tuple[dict[str, int | str | bool], dict[str, int]]:
    """(facts, sizes) under which the files of `tuned/` know a step."""
    exact: dict[str, int | str | bool] = {
        "head_dim": shape.head_dim,
        "num_kv_heads": shape.num_kv_heads,
        "group": shape.group_size,
        "block_size": shape.block_size,
        "max_q_len": shape.max_q_len,
        "fp8": is_fp8(dtype),
    }
    return exact, {"seqs": num_seqs}


def default_decode_config(shape: DecodeShape, num_seqs: int, dtype: DTypeLike) -> DecodeConfig:
    """The configuration of a case that is not tuned.

    Raises:
        NotImplementedError: The query heads of one KV head are more than the rows of a tile.
    """
    choices, options = _decode_options(shape, num_seqs, dtype)
    best = None
    for heads in choices:
        config = DecodeConfig(heads=heads, **options)
        try:
            fits = tiling(config, shape)
        except ValueError:
            continue
        if fits.token_rows == heads * shape.group_size:  # else q has to be padded, and the output cut
            return config
        best = best or config
    if best is not None:
        return best
    raise NotImplementedError(
        f"{shape.group_size} query heads share a KV head; mosaic_gpu takes at most {TILE_ROWS}: "
        "use implementation='xla'"
    )


def _decode_options(shape: DecodeShape, num_seqs: int, dtype: DTypeLike) -> tuple[tuple[int, ...], dict[str, int]]:
    """(DecodeConfig.heads, the best first; its other fields)."""
    if is_fp8(dtype):
        few = num_seqs <= _FEW_FP8_SEQUENCES
        heads = (2, 4, 1) if few else (4, 2, 1) if num_seqs <= _SOME_FP8_SEQUENCES else (8, 4, 2, 1)
        options = {
            64: {"stages": 6, "streams": 2, "converted": 2} if few else {"stages": 5, "streams": 3, "staged": 32},
            128: {"stages": 7, "converted": 2, "unroll": 32} if few else {"stages": 3, "streams": 2, "staged": 32},
            256: {"stages": 5, "columns": 64},
        }
        return heads, options[shape.head_dim]
    few = num_seqs <= _FEW_SEQUENCES
    heads = (2, 4, 1) if few else (8, 4, 2, 1)
    if shape.max_q_len > 1:
        return heads, {64: {"stages": 5, "streams": 2}, 128: {"stages": 4, "staged": 128, "unroll": 2}}[shape.head_dim]
    cut = {"unroll": 32, "min_tiles": 1} if num_seqs <= _LONE_SEQUENCES else {"unroll": 8}
    options = {
        64: {"stages": 5, "streams": 2, **cut} if few else {"stages": 3, "streams": 3},
        128: {"stages": 5, "staged": 128, **cut} if few else {"stages": 2, "streams": 2},
        256: {"stages": 5, "columns": 64},
    }
    return heads, options[shape.head_dim]


def _decode_tokens(group: int, head_dim: int, dtype: DTypeLike, wanted: int) -> int:
    """Most query tokens of a sequence that the decode kernel takes; at head dim 256 and with fp8 more than one spill
    registers."""
    if head_dim == 256 or is_fp8(dtype):
        return 1
    return max(1, min(wanted, TILE_ROWS // (-(-group // 8) * 8)))


def looks_for_prefixes(head_dim: int, num_seqs: int, dtype: DTypeLike) -> bool:
    """Whether a step of num_seqs sequences with one token each, without a window, compares their block tables."""
    # What was measured: 16-bit caches. With fp8 three streams of a CTA, at head dim 64, spill registers.
    return num_seqs >= _MIN_SHARING_SEQUENCES and head_dim <= 128 and not is_fp8(dtype)


def plan_hopper(
    metadata: Metadata,
    *,
    num_tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: DTypeLike,
    decode_only: bool,
    max_decode_tokens: int,
    sliding_windows: Sequence[int | None],
    interpret: bool,
) -> HopperPlan:
    """The plans of both kernels; the arguments are plan_attention's.

    Raises:
        NotImplementedError: The kernels cannot serve this shape.
    """
    decode_tokens = _decode_tokens(num_q_heads // num_kv_heads, head_dim, dtype, max_decode_tokens)
    shape = DecodeShape(num_tokens, num_q_heads, num_kv_heads, head_dim, block_size, decode_tokens)
    config = decode_config(shape, metadata[1].shape[0], dtype)
    if interpret:
        config = dataclasses.replace(config, ctas=_INTERPRETED_CTAS)
    may_share = decode_only and decode_tokens == 1 and looks_for_prefixes(head_dim, metadata[1].shape[0], dtype)
    shapes = [
        dataclasses.replace(shape, sliding_window=window, finds_prefixes=may_share and window is None)
        for window in sliding_windows
    ]
    prefill = None
    if not decode_only or decode_tokens < max_decode_tokens:
        prefill = plan_prefill(
            *metadata,
            num_tokens=num_tokens,
            tile_tokens=_prefill_config(head_dim, dtype, interpret).tile_tokens,
            block_size=block_size,
            min_tokens=decode_tokens + 1,
        )
    decodes = tuple(plan_decode(*metadata, each, config) for each in shapes)
    return HopperPlan(decodes, prefill, interpret)


def _prefill_config(head_dim: int, dtype: DTypeLike, interpret: bool):
    from pallas_kernels.ragged_paged_attention.mosaic_prefill import default_config

    config = default_config(head_dim, dtype)
    return dataclasses.replace(config, num_ctas=_INTERPRETED_CTAS) if interpret else config


def attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    plan: HopperPlan,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """See api.ragged_paged_attention.

    Raises:
        ValueError: The step was planned without this window.
        NotImplementedError: q and the caches differ in dtype.
    """
    from pallas_kernels.ragged_paged_attention.mosaic_decode import decode_attention
    from pallas_kernels.ragged_paged_attention.mosaic_prefill import prefill_attention

    dtype = q.dtype
    if is_fp8(k_cache.dtype):
        # The kernels turn the cache into float16, which holds every e4m3 number; so must the queries be.
        q = jnp.clip(q.astype(jnp.float32), -_F16_MAX, _F16_MAX).astype(jnp.float16)
    elif q.dtype != k_cache.dtype:
        raise NotImplementedError(
            f"q is {q.dtype.name} and the KV cache {k_cache.dtype.name}; mosaic_gpu needs one dtype, xla takes both"
        )
    planned = {decode.shape.sliding_window: decode for decode in plan.decodes}
    if sliding_window not in planned:
        raise ValueError(
            f"sliding_window is {sliding_window}; the step was planned for {list(planned)}: pass it to plan_attention"
        )
    options = {"scale": scale, "soft_cap": soft_cap, "sinks": sinks, "interpret": plan.interpret}
    decode = planned[sliding_window]
    output = decode_attention(q, k_cache, v_cache, decode, zero_padding=plan.prefill is None, **options)
    if plan.prefill is None:
        return output.astype(dtype)
    config = _prefill_config(q.shape[2], k_cache.dtype, plan.interpret)
    options = {**options, "sliding_window": sliding_window, "config": config}
    return prefill_attention(q, k_cache, v_cache, plan.prefill, output, **options).astype(dtype)
