"""An fp8 KV cache: conversion of its tiles, attention with scales, and what a write stores."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.implementation import XLA
from pallas_kernels.kv_scales import FP8, scaled_heads
from pallas_kernels.ragged_paged_attention import reference
from pallas_kernels.ragged_paged_attention.plan_decode import Seq
from tests.kernels.cases import (
    IMPLEMENTATIONS,
    INTERPRET,
    assert_tokens_close,
    batch_of_heads,
    decode_plan,
    needs_mosaic,
    on_gpu,
    step_plan,
)
from tests.kernels.test_decode import check as check_decode
from tests.kernels.test_prefill import check as check_prefill

make_batch = functools.partial(batch_of_heads, cache_dtype=FP8)


def powers_of_two(num_kv_heads: int, first: int) -> jax.Array:
    return 2.0 ** (first + jnp.arange(num_kv_heads, dtype=jnp.float32) % 3)


@needs_mosaic
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_threads_convert_every_chunk_once_without_bank_conflicts(head_dim: int, rows: int):
    from pallas_kernels.ragged_paged_attention.mosaic_fp8 import CHUNK, offsets, place

    def in_swizzled_tiles(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Byte of an f16 element in a tile that is tiled (8, 64) and swizzled over 128 bytes."""
        tile = row // 8 * (head_dim // 64) + column // 64
        return tile * 1024 + row % 8 * 128 + ((column % 64 // 8) ^ (row % 8)) * 16 + column % 8 * 2

    first_row, source, target = place(np.arange(128), head_dim)
    converted = np.zeros((rows, head_dim), int)
    for more_rows, more_source, more_target in offsets(rows, head_dim):
        row, column = np.divmod(source + more_source, head_dim)
        np.testing.assert_array_equal(row, first_row + more_rows)
        stores = target + more_target, (target ^ 16) + more_target
        for half, store in enumerate(stores):
            np.testing.assert_array_equal(store, in_swizzled_tiles(row, column + CHUNK // 2 * half))
        for byte in (source + more_source, *stores):
            banks = byte.reshape(-1, 8) // 16 % 8
            np.testing.assert_array_equal(np.sort(banks), np.broadcast_to(np.arange(8), banks.shape))
        np.add.at(converted, (row[:, None], column[:, None] + np.arange(CHUNK)), 1)
    assert (converted == 1).all()


# (query heads, KV heads, head dim), block size, config
DECODE = {
    "turns": ((8, 2, 64), 16, {"heads": 2, "columns": 64, "stages": 3, "ctas": 2}),
    "two_tiles": ((8, 2, 128), 16, {"heads": 2, "columns": 64, "stages": 3, "ctas": 2, "converted": 2}),
    "two_streams": ((8, 8, 64), 16, {"heads": 8, "columns": 128, "stages": 2, "streams": 2, "ctas": 1, "staged": 32}),
    "part_of_a_block": ((8, 1, 128), 128, {"heads": 1, "columns": 64, "stages": 3, "ctas": 3, "converted": 2}),
}


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("name", DECODE)
def test_decode_kernel(name: str, interpret: bool):
    heads, block_size, config = DECODE[name]
    batch = make_batch(1, [1, 1, 1], [200, 1, 64], heads, block_size, padding_seqs=1, padding_tokens=1, dtype="float16")
    check_decode(batch, decode_plan(batch, **config), interpret=interpret)


@pytest.mark.parametrize("interpret", INTERPRET)
def test_decode_kernel_window_and_tokens(interpret: bool):
    batch = make_batch(2, [1, 3], [150, 170], (8, 2, 64), 16, dtype="float16")
    config = {"heads": 2, "columns": 64, "stages": 2, "ctas": 3, "converted": 2}
    check_decode(batch, decode_plan(batch, max_q_len=3, sliding_window=70, **config), interpret=interpret)


@pytest.mark.parametrize("interpret", INTERPRET)
def test_decode_kernel_shares_prefixes(interpret: bool):
    kv_lens = [300, 273, 280, 290, 320, 400, 288, 289, 30]
    batch = make_batch(5, [1] * 9, kv_lens, (8, 2, 128), 16, dtype="float16", shared_blocks=17)
    config = {"heads": 2, "columns": 64, "stages": 2, "streams": 2, "ctas": 2}
    plan = decode_plan(batch, finds_prefixes=True, **config)
    assert plan.seqs[0, Seq.TILES] > 0
    check_decode(batch, plan, interpret=interpret)


PREFILL = {
    "ragged": ([70, 1, 40], [200, 30, 40], (4, 2, 64), 16, {}),
    "wide_block": ([30, 9], [150, 9], (2, 1, 128), 128, {"sliding_window": 60, "soft_cap": 5.0}),
}


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("name", PREFILL)
def test_prefill_kernel(name: str, interpret: bool):
    from pallas_kernels.ragged_paged_attention.mosaic_prefill import default_config

    q_lens, kv_lens, heads, block_size, options = PREFILL[name]
    batch = make_batch(3, q_lens, kv_lens, heads, block_size, padding_seqs=1, padding_tokens=3, dtype="float16")
    config = dataclasses.replace(default_config(heads[2], FP8), num_ctas=3)
    check_prefill(batch, config, interpret, **options)


@pytest.mark.parametrize("implementation", [pytest.param("xla", id="xla"), pytest.param("mosaic_gpu", marks=on_gpu)])
@pytest.mark.parametrize("decode_only", [True, False])
def test_attention_with_scales(implementation: str, decode_only: bool):
    q_lens, kv_lens = ([1] * 3, [200, 1, 64]) if decode_only else ([1, 150, 20], [100, 200, 20])
    batch = make_batch(4, q_lens, kv_lens, (8, 2, 128), 16)
    scales: dict[str, Any] = {"k_scale": powers_of_two(2, -2), "v_scale": powers_of_two(2, 1)}
    plan = step_plan(batch, implementation, decode_only=decode_only)
    got = pallas_kernels.ragged_paged_attention(batch.q, batch.k_cache, batch.v_cache, plan, scale=0.1, **scales)
    assert got.dtype == jnp.bfloat16
    arrays = (batch.q, batch.k_cache, batch.v_cache, *batch.metadata)
    wanted = reference.ragged_paged_attention(*arrays, scale=0.1, **scales)
    assert_tokens_close(np.asarray(got, np.float32), np.asarray(wanted))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_write_divides_rounds_and_saturates(implementation: str):
    slots = jnp.array([17, -1, 35], jnp.int32)
    k = jnp.broadcast_to(jnp.array([1.0, -1000.0, 3.0625], jnp.bfloat16)[:, None, None], (3, 2, 64))
    cache = jnp.zeros((3, 2, 16, 64), FP8)
    scale = jnp.array([1.0, 0.25], jnp.float32)
    k_cache, v_cache = pallas_kernels.write_kv(
        cache, cache, k, k * 300, slots, k_scale=scale, v_scale=scale, implementation=implementation
    )
    got = np.asarray(k_cache, np.float32)[:, :, :, 0]
    assert got[1, :, 1].tolist() == [1.0, 4.0] and got[2, :, 3].tolist() == [3.0, 12.0]
    assert np.asarray(v_cache, np.float32)[2, :, 3, 5].tolist() == [448.0, 448.0]
    assert np.count_nonzero(got) == 4


def test_scales_of_two_heads_reach_their_query_heads():
    x = jnp.ones((1, 6, 4), jnp.bfloat16)
    assert scaled_heads(x, powers_of_two(2, 3))[0, :, 0].tolist() == [8, 8, 8, 16, 16, 16]


def test_bad_scales_are_named():
    cache = jnp.zeros((3, 2, 16, 64), FP8)
    k = jnp.zeros((1, 2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"k_scale has shape \[3\]; wanted \[2\]"):
        pallas_kernels.write_kv(cache, cache, k, k, jnp.zeros(1, jnp.int32), k_scale=jnp.ones(3), implementation=XLA)
