"""Hopper decode attention: the plan, and the kernels in the interpreter, against the dense float32 definition."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import reference
from tests.kernels.cases import RaggedBatch, assert_no_races, needs_mosaic, ragged_batch

pytestmark = needs_mosaic
TOLERANCE = {"float16": 1.5e-3, "bfloat16": 6e-3}


def make_plan(batch: RaggedBatch, *, max_q_len: int = 1, sliding_window: int | None = None, **config):
    from pallas_kernels.ragged_paged_attention.plan_decode import DecodeConfig, DecodeShape, plan_decode

    num_tokens, num_q_heads, head_dim = batch.q.shape
    shape = DecodeShape(
        num_tokens=num_tokens,
        num_q_heads=num_q_heads,
        num_kv_heads=batch.k_cache.shape[1],
        head_dim=head_dim,
        block_size=batch.k_cache.shape[2],
        max_q_len=max_q_len,
        sliding_window=sliding_window,
    )
    return plan_decode(*map(jnp.asarray, batch.metadata), shape, DecodeConfig(**config))


def run(batch: RaggedBatch, plan, **options) -> np.ndarray:
    from pallas_kernels.ragged_paged_attention.mosaic_decode import decode_attention

    options = {"scale": batch.q.shape[-1] ** -0.5, **options}
    got = decode_attention(batch.q, batch.k_cache, batch.v_cache, plan, interpret=True, **options)
    got = np.asarray(got.astype(jnp.float32))
    assert_no_races()
    return got


def check(batch: RaggedBatch, plan, **options) -> None:
    got = run(batch, plan, **options)
    options = {"scale": batch.q.shape[-1] ** -0.5, **options}
    wanted = np.asarray(
        reference.ragged_paged_attention(
            batch.q, batch.k_cache, batch.v_cache, *batch.metadata, sliding_window=plan.shape.sliding_window, **options
        )
    )
    assert np.isfinite(got).all()
    real = batch.num_real_tokens
    assert not got[real:].any()
    for token in range(real):
        error = np.linalg.norm(got[token] - wanted[token]) / np.linalg.norm(wanted[token])
        assert error < TOLERANCE[batch.q.dtype.name], f"token {token}: relative error {error}"


def decode_batch(seed: int, kv_lens: list[int], heads: tuple[int, int, int], block_size: int, padding: int = 0):
    num_q_heads, num_kv_heads, head_dim = heads
    return ragged_batch(
        seed,
        [1] * len(kv_lens),
        kv_lens,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype="bfloat16",
        padding_seqs=padding,
        padding_tokens=padding,
    )


def test_first():
    batch = decode_batch(1, [200, 1, 64], (8, 2, 64), 16, 2)
    check(batch, make_plan(batch, heads=2, columns=64, stages=3, ctas=2))
