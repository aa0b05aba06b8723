"""Query tiles, choice of the implementation and argument checks."""

from __future__ import annotations

import itertools
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.implementation import mosaic_unavailable_reason
from pallas_kernels.ragged_paged_attention.hopper import HopperPlan
from pallas_kernels.ragged_paged_attention.plan_prefill import PrefillPlan
from pallas_kernels.ragged_paged_attention.tiles import TilePlan
from tests.kernels.cases import needs_mosaic

DEFAULTS = {
    "num_tokens": 48,
    "num_q_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 64,
    "block_size": 16,
    "dtype": jnp.float32,
    "decode_only": False,
    "implementation": "xla",
}
TABLES = np.zeros((5, 4), np.int32)


def plan(q_lens, kv_lens, **options):
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    rows = np.arange(len(q_lens), dtype=np.int32) + 1
    return pallas_kernels.plan_attention(
        TABLES, rows, cu_q_lens, np.asarray(kv_lens, np.int32), **{**DEFAULTS, **options}
    )


def plan_tiles(*lens, **options) -> TilePlan:
    work = plan(*lens, **options).work
    assert isinstance(work, TilePlan)
    return work


def plan_hopper(*lens, **options) -> HopperPlan:
    work = plan(*lens, dtype=jnp.bfloat16, implementation="mosaic_gpu", **options).work
    assert isinstance(work, HopperPlan)
    return work


def used_tiles(prefill: PrefillPlan | None) -> int:
    return 0 if prefill is None else int(prefill.num_tiles[0])


def test_tiles_cover_every_token_once():
    tiles = plan_tiles([1, 33, 1, 0], [9, 40, 1, 0])
    np.testing.assert_array_equal(tiles.length, [1, 16, 16, 1, 1, 0, 0])
    np.testing.assert_array_equal(tiles.start[:5], [0, 1, 17, 33, 34])
    np.testing.assert_array_equal(tiles.position[:5], [8, 7, 23, 39, 0])
    np.testing.assert_array_equal(tiles.table_row[:5], [1, 2, 2, 2, 3])
    row = np.asarray(tiles.token_row)
    assert (row[35:] == -1).all()
    tile, offset = row[:35] // 16, row[:35] % 16
    np.testing.assert_array_equal(np.asarray(tiles.start)[tile] + offset, np.arange(35))


def test_tile_bound_holds_for_the_worst_split():
    q_lens = [17] * 2 + [1] * 14
    tiles = plan_tiles(q_lens, q_lens)
    assert int((np.asarray(tiles.length) > 0).sum()) == 18
    assert int(tiles.length.sum()) == 48
    assert tiles.length.shape == (48 // 16 + 16,)


def test_few_tokens_have_one_tile_a_sequence():
    tiles = plan_tiles([3, 1, 2], [9, 40, 2], num_tokens=8, decode_only=True, max_decode_tokens=3)
    np.testing.assert_array_equal(tiles.length, [3, 1, 2])
    np.testing.assert_array_equal(tiles.token_row, [0, 1, 2, 3, 6, 7, -1, -1])


MOSAIC = {"dtype": jnp.bfloat16, "implementation": "mosaic_gpu"}


@needs_mosaic
def test_which_hopper_kernels_serve_a_step():
    decode = plan_hopper([1, 1], [50, 60], num_tokens=2, decode_only=True, sliding_windows=(None, 32))
    assert [each.shape.sliding_window for each in decode.decodes] == [None, 32] and decode.prefill is None
    mixed = plan_hopper([1, 47], [50, 60])
    assert mixed.decodes[0].shape.max_q_len == 1 and used_tiles(mixed.prefill) == 1
    few = {"num_tokens": 6, "decode_only": True, "max_decode_tokens": 3}
    verify = plan_hopper([3, 3], [50, 60], **few)
    assert verify.decodes[0].shape.max_q_len == 3 and verify.prefill is None
    # More rows than a tile of the decode kernel has, or more registers than a thread: the prefill kernel takes them.
    for options in ({"num_q_heads": 64, "num_kv_heads": 2}, {"head_dim": 256}):
        work = plan_hopper([3, 3], [50, 60], **few, **options)
        assert work.decodes[0].shape.max_q_len < 3 and used_tiles(work.prefill) == 2


@needs_mosaic
def test_decode_config_of_every_shape():
    """What is chosen fits the shape and shared memory, for any group and block size."""
    from pallas_kernels.ragged_paged_attention.hopper import default_decode_config
    from pallas_kernels.ragged_paged_attention.plan_decode import TILE_ROWS, DecodeShape, tiling

    sizes = itertools.product(
        (1, 2, 3, 4, 7, 8, 16, 64), (1, 2, 3, 8), (64, 128, 256), (16, 32, 64, 128), (1, 5), (1, 8, 64), (False, True)
    )
    for group, kv_heads, head_dim, block_size, max_q_len, num_seqs, fp8 in sizes:
        if max_q_len > 1 and (head_dim == 256 or group > 8 or fp8):
            continue
        shape = DecodeShape(num_seqs, group * kv_heads, kv_heads, head_dim, block_size, max_q_len)
        config = default_decode_config(shape, num_seqs, "float8_e4m3fn" if fp8 else "bfloat16")
        tiling(config, shape)
        ring = config.columns * head_dim * (config.stages + 2 * config.converted if fp8 else 2 * config.stages)
        used = config.streams * (ring + TILE_ROWS * (head_dim * 2 + min(config.staged, head_dim) * 4) + 1024)
        assert used <= 227 * 1024, (shape, config)


@needs_mosaic
def test_decode_config_of_an_fp8_cache_goes_by_the_sequences():
    from pallas_kernels.ragged_paged_attention.hopper import default_decode_config
    from pallas_kernels.ragged_paged_attention.plan_decode import DecodeShape

    chosen = [default_decode_config(DecodeShape(n, 32, 8, 128, 16), n, "float8_e4m3fn") for n in (4, 5, 16, 17)]
    assert [(config.heads, config.streams) for config in chosen] == [(2, 1), (4, 2), (4, 2), (8, 2)]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="block_size is 48; allowed: 16, 32, 64, 128"):
        plan([48], [48], block_size=48)
    with pytest.raises(ValueError, match="num_q_heads is 7; it must be a multiple of num_kv_heads, 2"):
        plan([48], [48], num_q_heads=7)
    with pytest.raises(ValueError, match="decode_only needs one token a sequence, 1"):
        plan([48], [48], decode_only=True)
    with pytest.raises(ValueError, match="decode_only takes at most 5 for each of 1 sequences"):
        plan([48], [48], decode_only=True, max_decode_tokens=5)
    with pytest.raises(ValueError, match="max_decode_tokens is 0"):
        plan([48], [48], max_decode_tokens=0)
    with pytest.raises(ValueError, match=r"kv_lens has shape \[2\]; wanted \[1\]"):
        plan([48], [48, 1])
    with pytest.raises(ValueError, match="implementation is 'triton'; allowed: xla, mosaic_gpu"):
        plan([48], [48], implementation="triton")
    made = plan([48], [48])
    q, cache = jnp.zeros((48, 8, 64)), jnp.zeros((3, 2, 16, 64))
    for wrong, text in (
        ({"q": q[:40]}, r"q has shape \[40, 8, 64\]; wanted \[48, 8, 64\]"),
        ({"k_cache": cache[:, :1], "v_cache": cache[:, :1]}, r"k_cache has shape .*; wanted \[\?, 2, 16, 64\]"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"soft_cap": -1.0}, "soft_cap is -1.0"),
        ({"sinks": jnp.zeros(2)}, r"sinks has shape \[2\]; wanted \[8\]"),
    ):
        arguments = {"q": q, "k_cache": cache, "v_cache": cache, "plan": made, "scale": 1.0, **wrong}
        with pytest.raises(ValueError, match=text):
            pallas_kernels.ragged_paged_attention(**arguments)


@needs_mosaic
def test_what_mosaic_cannot_do():
    for options, text in (
        ({"dtype": jnp.float32}, "KV cache dtype is float32"),
        ({"head_dim": 96}, "head_dim is 96"),
        ({"num_q_heads": 200}, "100 query heads share a KV head"),
    ):
        with pytest.raises(NotImplementedError, match=text):
            plan([48], [48], **{**MOSAIC, **options})


@needs_mosaic
def test_window_that_was_not_planned():
    made = plan([48], [48], sliding_windows=(16, 32), **MOSAIC)
    q, cache = jnp.zeros((48, 8, 64), jnp.bfloat16), jnp.zeros((3, 2, 16, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"sliding_window is None; the step was planned for \[16, 32\]"):
        pallas_kernels.ragged_paged_attention(q, cache, cache, made, scale=1.0)


def test_padded_head_dim():
    assert pallas_kernels.padded_head_dim(80, "xla") == 80
    if mosaic_unavailable_reason() is None:
        assert [pallas_kernels.padded_head_dim(d, "mosaic_gpu") for d in (64, 80, 96, 128, 200)] == [
            64,
            128,
            128,
            128,
            256,
        ]
        with pytest.raises(NotImplementedError, match="at most 256"):
            pallas_kernels.padded_head_dim(257, "mosaic_gpu")
    else:
        with pytest.raises(NotImplementedError, match=r"jax >= 0\.11"):
            pallas_kernels.padded_head_dim(128, "mosaic_gpu")


def test_import_leaves_pallas_alone():
    code = "import sys, pallas_kernels; sys.exit(any('pallas.mosaic_gpu' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_default_on_the_cpu(caplog: pytest.LogCaptureFixture):
    assert pallas_kernels.default_implementation(jnp.bfloat16, 128) == "xla"
    assert not caplog.records
