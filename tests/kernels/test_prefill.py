"""The prefill kernel: its plan, and the kernel against the dense float32 definition."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import reference
from pallas_kernels.ragged_paged_attention.plan_prefill import (
    END,
    POSITION,
    SKIP,
    START,
    STOP,
    TABLE_ROW,
    PrefillPlan,
    max_tiles,
    plan_prefill,
)
from tests.kernels.cases import INTERPRET, RaggedBatch, assert_no_races, assert_tokens_close, needs_mosaic, ragged_batch


def make_plan(batch: RaggedBatch, tile_tokens: int, min_tokens: int = 1) -> PrefillPlan:
    make = functools.partial(
        plan_prefill,
        num_tokens=batch.q.shape[0],
        tile_tokens=tile_tokens,
        block_size=batch.k_cache.shape[2],
        min_tokens=min_tokens,
    )
    return jax.jit(make)(*batch.metadata)


def random_steps():
    """Tokens and keys of each sequence and the (padded) number of tokens: two of these, so that two programs serve all
    steps, each with one step that it fits."""
    rng = np.random.default_rng(0)
    steps = []
    for _ in range(8):
        num_seqs = int(rng.integers(1, 9))
        q_lens = rng.integers(1, 200, num_seqs) * (rng.random(num_seqs) < 0.7) + 1
        steps.append((q_lens, q_lens + rng.integers(0, 300, num_seqs)))
    steps.sort(key=lambda step: step[0].sum())
    for i, (q_lens, kv_lens) in enumerate(steps):
        yield q_lens, kv_lens, int(steps[i // 4 * 4 + 3][0].sum())


@pytest.mark.parametrize("tile_tokens", [16, 64, 128, 192])
@pytest.mark.parametrize("min_tokens", [1, 2])
def test_tiles_cover_each_token_once(tile_tokens: int, min_tokens: int):
    programs = {}
    for q_lens, kv_lens, num_tokens in random_steps():
        cu_q_lens = np.full(9, q_lens.sum(), np.int32)
        cu_q_lens[: len(q_lens)] = np.cumsum(q_lens) - q_lens
        table_rows, padded_kv_lens = np.zeros((2, 8), np.int32)
        table_rows[: len(q_lens)] = np.arange(1, len(q_lens) + 1)
        padded_kv_lens[: len(q_lens)] = kv_lens
        make = functools.partial(
            plan_prefill, num_tokens=num_tokens, tile_tokens=tile_tokens, block_size=16, min_tokens=min_tokens
        )
        plan = programs.setdefault(num_tokens, jax.jit(make))(
            np.zeros((9, 4), np.int32), table_rows, cu_q_lens, padded_kv_lens
        )
        count = int(plan.num_tiles[0])
        assert plan.tiles.shape[0] == max_tiles(num_tokens, 8, tile_tokens, min_tokens) >= count
        tiles = np.asarray(plan.tiles)[:count]
        assert (tiles[:, START] % 8 == 0).all()
        assert (np.diff(tiles[:, END]) <= 0).all(), "longest first"
        seen = np.zeros(num_tokens, np.int32)
        for tile in tiles:
            offset = np.arange(tile[SKIP], tile[STOP])
            token = tile[START] + offset
            seen[token] += 1
            if tile[END] == 0:
                assert (token >= cu_q_lens[-1]).all()
                assert (tile[POSITION] + offset < 0).all()
                continue
            seq = tile[TABLE_ROW] - 1
            np.testing.assert_array_equal(tile[POSITION] + offset, kv_lens[seq] - cu_q_lens[seq + 1] + token)
            assert tile[END] == tile[POSITION] + tile[STOP]
        wanted = np.repeat(q_lens >= min_tokens, q_lens)
        np.testing.assert_array_equal(seen[: len(wanted)], wanted)
        assert (seen[len(wanted) :] == 1).all()


def test_plan_rejects_unaligned_tiles():
    with pytest.raises(ValueError, match="tile_tokens is 20"):
        plan_prefill(*(jnp.zeros(2, jnp.int32),) * 4, num_tokens=8, tile_tokens=20, block_size=16)


def check(batch: RaggedBatch, config, interpret: bool, *, sinks: jax.Array | None = None, **options) -> None:
    from pallas_kernels.ragged_paged_attention.mosaic_prefill import prefill_attention

    options = {"scale": batch.q.shape[-1] ** -0.5, **options}
    plan = make_plan(batch, config.tile_tokens)
    arguments = (batch.q, batch.k_cache, batch.v_cache)
    output = prefill_attention(*arguments, plan, sinks=sinks, config=config, interpret=interpret, **options)
    assert output.dtype == batch.q.dtype
    got = np.asarray(output.astype(jnp.float32))
    if interpret:
        assert_no_races()
    real = batch.num_real_tokens
    assert not got[real:].any()
    wanted = np.asarray(reference.ragged_paged_attention(*arguments, *batch.metadata, **options))
    if sinks is not None:
        wanted = wanted * with_sinks(batch, sinks, **options)
    assert_tokens_close(got[:real], wanted[:real], batch.q.dtype.name)


def with_sinks(batch: RaggedBatch, sinks: jax.Array, scale: float) -> np.ndarray:
    """[T, H, 1]: what a sink leaves of each output, exp(lse) / (exp(lse) + exp(sink))."""
    q, k = np.asarray(batch.q, np.float32), np.asarray(batch.k_cache, np.float32)
    group = q.shape[1] // k.shape[1]
    factor = np.zeros((*q.shape[:2], 1), np.float32)
    for seq, row in enumerate(batch.table_rows):
        keys = np.moveaxis(k[batch.block_tables[row]], 0, 1).reshape(k.shape[1], -1, q.shape[2])
        for token in range(batch.cu_q_lens[seq], batch.cu_q_lens[seq + 1]):
            position = batch.kv_lens[seq] - batch.cu_q_lens[seq + 1] + token
            scores = np.einsum("hd,hcd->hc", q[token], np.repeat(keys, group, axis=0)[:, : position + 1]) * scale
            mass = np.exp(scores).sum(axis=1)
            factor[token, :, 0] = mass / (mass + np.exp(np.asarray(sinks)))
    return factor


def config_of(**options):
    from pallas_kernels.ragged_paged_attention.mosaic_prefill import Config

    return Config(**{"num_ctas": 2, "tile_keys": 64, **options})


def batch_of(
    q_lens, kv_lens, *, num_q_heads=2, num_kv_heads=1, head_dim=64, block_size=16, dtype="bfloat16", padding=0
):
    return ragged_batch(
        1,
        q_lens,
        kv_lens,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        padding_seqs=padding,
        padding_tokens=padding * 5,
    )


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({}, {}),
        ({"tile_tokens": 64, "tile_keys": 128}, {"block_size": 64}),
        ({"tile_tokens": 32}, {"num_q_heads": 4, "block_size": 128}),
        (
            {"warpgroups": 3, "tile_tokens": 192, "stages": 3, "registers": (160, 32)},
            {"dtype": "float16", "block_size": 32},
        ),
        ({}, {"head_dim": 256, "num_q_heads": 1}),
    ],
    ids=["plain", "two_heads", "four_heads", "three_warpgroups", "head_256"],
)
def test_ragged(interpret: bool, config: dict, shape: dict):
    check(batch_of([75, 5, 32], [75, 69, 200], padding=1, **shape), config_of(**config), interpret)


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("options", [{"sliding_window": 1}, {"sliding_window": 70}, {"soft_cap": 2.0, "scale": 0.5}])
def test_options(interpret: bool, options: dict):
    check(batch_of([9, 100], [150, 130]), config_of(), interpret, **options)


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("tile_tokens", [128, 32])
def test_sinks(interpret: bool, tile_tokens: int):
    batch = batch_of([40], [70], num_q_heads=8, num_kv_heads=2)
    sinks = jnp.linspace(-2.0, 6.0, 8, dtype=jnp.float32)
    check(batch, config_of(tile_tokens=tile_tokens), interpret, sinks=sinks, scale=0.125)


@pytest.mark.parametrize("interpret", INTERPRET)
def test_rows_of_other_kernels_are_kept(interpret: bool):
    """Sequences of fewer than min_tokens tokens keep what the given output holds."""
    from pallas_kernels.ragged_paged_attention.mosaic_prefill import prefill_attention

    batch = batch_of([1, 1, 1, 20, 30], [50, 3, 7, 20, 90], padding=1)
    given = jnp.full_like(batch.q, 7.0)
    plan = make_plan(batch, 128, min_tokens=2)
    got = prefill_attention(
        batch.q, batch.k_cache, batch.v_cache, plan, given, scale=0.125, config=config_of(), interpret=interpret
    )
    got = np.asarray(got.astype(jnp.float32))
    wanted = np.asarray(
        reference.ragged_paged_attention(batch.q, batch.k_cache, batch.v_cache, *batch.metadata, scale=0.125)
    )
    np.testing.assert_array_equal(got[:3], 7.0)
    np.testing.assert_allclose(got[3:53], wanted[3:53], atol=0.03)
    assert not got[53:].any()


@needs_mosaic
def test_wrong_configurations():
    from pallas_kernels.ragged_paged_attention.mosaic_prefill import prefill_attention

    batch = batch_of([40], [40])
    arguments = (batch.q, batch.k_cache, batch.v_cache)
    for config, plan_tokens, text in (
        ({"tile_tokens": 32}, 32, "an item has 4 heads"),
        ({"tile_tokens": 48}, 48, "it must divide 128"),
        ({}, 64, "the plan is for tiles of 64 tokens"),
    ):
        with pytest.raises(ValueError, match=text):
            prefill_attention(*arguments, make_plan(batch, plan_tokens), scale=1.0, config=config_of(**config))
    with pytest.raises(ValueError, match="scale is -1"):
        prefill_attention(*arguments, make_plan(batch, 128), scale=-1.0, config=config_of())
