"""The work of one step's attention, cut up on the device; built once a step, used by every layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.implementation import (
    MOSAIC_GPU_INTERPRET,
    check_mosaic_cache,
    checked_implementation,
    default_implementation,
    is_mosaic,
)
from pallas_kernels.ragged_paged_attention.hopper import HopperPlan, plan_hopper
from pallas_kernels.ragged_paged_attention.tiles import TilePlan, plan_tiles
from pallas_kernels.validation import Array, check_array, check_block_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """What the layers of one step share.

    Attributes:
        work: The step's work as the implementation cuts it.
        num_tokens, num_q_heads, num_kv_heads, head_dim, block_size: Of the step, the model and its cache, static.
        implementation: Which implementation the plan is for, static.
    """

    work: TilePlan | HopperPlan
    num_tokens: int = dataclasses.field(metadata={"static": True})
    num_q_heads: int = dataclasses.field(metadata={"static": True})
    num_kv_heads: int = dataclasses.field(metadata={"static": True})
    head_dim: int = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})
    implementation: str = dataclasses.field(metadata={"static": True})


def plan_attention(
    block_tables: Array,
    table_rows: Array,
    cu_q_lens: Array,
    kv_lens: Array,
    *,
    num_tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: DTypeLike,
    decode_only: bool,
    max_decode_tokens: int = 1,
    sliding_windows: Sequence[int | None] = (None,),
    implementation: str | None = None,
) -> AttentionPlan:
    """Cuts a step's attention into pieces of work, on the device.

    Sequence s owns the tokens cu_q_lens[s] to cu_q_lens[s+1]; its last token has position kv_lens[s] - 1, so kv_lens
    includes this step's tokens. Padding sequences come last and have no tokens and kv_len 0. Tokens from cu_q_lens[S]
    on are padding.

    Sequences whose block tables begin with the same ids share these keys. On Hopper a decode_only step of one token a
    sequence reads them once for several neighbours (see plan_decode); the result is the same up to rounding.

    Args:
        block_tables: i32[N, B], block ids of each persistent row, in order of position.
        table_rows: i32[S], the row of block_tables of each sequence.
        cu_q_lens: i32[S + 1], prefix sums of the sequences' token counts.
        kv_lens: i32[S], keys of each sequence.
        num_tokens: T, the (padded) number of tokens of the step.
        num_q_heads: Query heads, a multiple of num_kv_heads.
        num_kv_heads: KV heads.
        head_dim: Last axis of the KV cache (after padded_head_dim).
        block_size: Tokens per block: 16, 32, 64 or 128.
        dtype: Dtype of the KV cache.
        decode_only: Promise that no sequence has more than max_decode_tokens tokens, and T <= S * max_decode_tokens.
            With max_decode_tokens 1: that T == S and token s is the only token of sequence s, or padding.
        max_decode_tokens: Sequences of at most this many tokens count as decodes (more than 1: speculative
            verification).
        sliding_windows: The distinct sliding_window values of the layers that will use the plan.
        implementation: One of IMPLEMENTATIONS; None takes default_implementation(dtype, head_dim).

    Raises:
        ValueError: A shape, dtype or size is wrong.
        NotImplementedError: The implementation cannot serve this head dim, dtype or group size; "xla" can.
    """
    block_tables, table_rows, cu_q_lens, kv_lens = map(jnp.asarray, (block_tables, table_rows, cu_q_lens, kv_lens))
    check_array("block_tables", block_tables, (None, None), jnp.int32)
    check_array("table_rows", table_rows, (None,), jnp.int32)
    num_seqs = table_rows.shape[0]
    check_array("cu_q_lens", cu_q_lens, (num_seqs + 1,), jnp.int32)
    check_array("kv_lens", kv_lens, (num_seqs,), jnp.int32)
    check_block_size(block_size)
    if num_kv_heads < 1 or num_q_heads % num_kv_heads:
        raise ValueError(f"num_q_heads is {num_q_heads}; it must be a multiple of num_kv_heads, {num_kv_heads}")
    _check_decode(num_tokens, num_seqs, decode_only, max_decode_tokens)
    metadata = (block_tables, table_rows, cu_q_lens, kv_lens)
    chosen = checked_implementation(implementation or default_implementation(dtype, head_dim))
    if is_mosaic(chosen):
        check_mosaic_cache(dtype, head_dim)
        work = plan_hopper(
            metadata,
            num_tokens=num_tokens,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            dtype=dtype,
            decode_only=decode_only,
            max_decode_tokens=max_decode_tokens,
            sliding_windows=sliding_windows,
            interpret=chosen == MOSAIC_GPU_INTERPRET,
        )
    else:
        work = plan_tiles(*metadata, num_tokens=num_tokens, max_q_len=max_decode_tokens if decode_only else None)
    return AttentionPlan(
        work=work,
        num_tokens=num_tokens,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        implementation=chosen,
    )


def _check_decode(num_tokens: int, num_seqs: int, decode_only: bool, max_decode_tokens: int) -> None:
    if max_decode_tokens < 1:
        raise ValueError(f"max_decode_tokens is {max_decode_tokens}; it must be at least 1")
    if not decode_only:
        return
    if max_decode_tokens == 1 and num_tokens != num_seqs:
        raise ValueError(f"num_tokens is {num_tokens}; decode_only needs one token a sequence, {num_seqs}")
    if num_tokens > num_seqs * max_decode_tokens:
        raise ValueError(
            f"num_tokens is {num_tokens}; decode_only takes at most {max_decode_tokens} for each of {num_seqs} "
            "sequences"
        )
