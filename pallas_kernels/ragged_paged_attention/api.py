"""Ragged paged attention: one call for decode, chunked prefill and mixtures of both."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.kv_scales import check_scale, scaled_heads
from pallas_kernels.ragged_paged_attention import hopper, xla
from pallas_kernels.ragged_paged_attention.hopper import HopperPlan
from pallas_kernels.ragged_paged_attention.plan import AttentionPlan
from pallas_kernels.validation import check_array, check_caches


def ragged_paged_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    plan: AttentionPlan,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of a step's tokens over the paged KV cache, which already holds this step's keys and values.

    The method is PagedAttention (Kwon et al., arXiv 2309.06180) with FlashAttention's online softmax; splitting the
    keys of a decode is Flash-Decoding's (Dao et al., 2023).

    Args:
        q: [T, H, D], rotated queries.
        k_cache: [num_blocks, KVH, block_size, D].
        v_cache: Like k_cache.
        plan: From plan_attention, for this step.
        scale: Factor of the scores, usually the model's head_dim ** -0.5.
        sliding_window: A token at position p sees the keys in (p - sliding_window, p]; None: all of them up to p.
        soft_cap: Scores become soft_cap * tanh(score / soft_cap) before masking; None: off.
        sinks: f32[H], a logit per query head that takes part in the softmax and has no value; None: off.
        k_scale: f32[KVH], keys are k_cache * k_scale; None: 1. Powers of two, or q is rounded once more.
        v_scale: f32[KVH], the same for values and the output.

    Returns:
        [T, H, D] in the dtype of q; zeros for padding tokens.

    Raises:
        ValueError: A shape or dtype does not fit the plan or the caches, or an option is out of its domain.
        NotImplementedError: The plan's implementation cannot; "xla" can.
    """
    check_caches(k_cache, v_cache)
    check_array("k_cache", k_cache, (None, plan.num_kv_heads, plan.block_size, plan.head_dim))
    check_array("q", q, (plan.num_tokens, plan.num_q_heads, plan.head_dim))
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window is {sliding_window}; it must be at least 1, or None")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap is {soft_cap}; it must be positive, or None")
    if sinks is not None:
        check_array("sinks", sinks, (plan.num_q_heads,), jnp.float32)
    check_scale("k_scale", k_scale, plan.num_kv_heads)
    check_scale("v_scale", v_scale, plan.num_kv_heads)
    options = {"scale": scale, "sliding_window": sliding_window, "soft_cap": soft_cap}
    return _attention(q, k_cache, v_cache, plan, sinks, k_scale, v_scale, **options)


@functools.partial(jax.jit, static_argnames=("scale", "sliding_window", "soft_cap"))
def _attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    plan: AttentionPlan,
    sinks: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> jax.Array:
    # (q * k_scale) . stored = q . key, and the weighted mean of values is that of what is stored, times v_scale.
    q = scaled_heads(q, k_scale)
    options = {"scale": scale, "sliding_window": sliding_window, "soft_cap": soft_cap, "sinks": sinks}
    if isinstance(plan.work, HopperPlan):
        output = hopper.attention(q, k_cache, v_cache, plan.work, **options)
    else:
        output = xla.attention(q, k_cache, v_cache, plan.work, **options)
    return scaled_heads(output, v_scale)
