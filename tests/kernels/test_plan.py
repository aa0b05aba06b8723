"""Query tiles, choice of the implementation and argument checks."""

from __future__ import annotations

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.implementation import mosaic_unavailable_reason
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


def test_tiles_cover_every_token_once():
    made = plan([1, 33, 1, 0], [9, 40, 1, 0])
    length = np.asarray(made.tile_len)
    np.testing.assert_array_equal(length, [1, 16, 16, 1, 1, 0, 0])
    np.testing.assert_array_equal(made.tile_start[:5], [0, 1, 17, 33, 34])
    np.testing.assert_array_equal(made.tile_pos[:5], [8, 7, 23, 39, 0])
    np.testing.assert_array_equal(made.tile_table_row[:5], [1, 2, 2, 2, 3])
    row = np.asarray(made.token_row)
    assert (row[35:] == -1).all()
    tile, offset = row[:35] // 16, row[:35] % 16
    np.testing.assert_array_equal(np.asarray(made.tile_start)[tile] + offset, np.arange(35))


def test_tile_bound_holds_for_the_worst_split():
    q_lens = [17] * 2 + [1] * 14
    made = plan(q_lens, q_lens)
    assert int((np.asarray(made.tile_len) > 0).sum()) == 18
    assert int(made.tile_len.sum()) == 48
    assert made.tile_len.shape == (48 // 16 + 16,)


@needs_mosaic
def test_mosaic_tiles_and_splits():
    options = {"dtype": jnp.bfloat16, "implementation": "mosaic_gpu"}
    assert plan([48], [48], **options).tile_tokens == 16
    assert plan([48], [48], num_q_heads=14, **options).tile_tokens == 9
    decode = plan([1, 1], [50, 60], num_tokens=2, decode_only=True, **options)
    assert (decode.tile_tokens, decode.num_splits) == (1, 1)  # the table holds one chunk of keys
    wide = np.zeros((5, 600), np.int32)
    for num_seqs, splits in ((1, 64), (2, 64), (8, 17), (132, 1), (200, 1)):
        ones = np.ones(num_seqs, np.int32)
        made = pallas_kernels.plan_attention(
            wide,
            ones,
            np.arange(num_seqs + 1, dtype=np.int32),
            ones,
            **{**DEFAULTS, **options, "num_tokens": num_seqs, "decode_only": True},
        )
        assert made.num_splits == splits


def test_wrong_arguments():
    with pytest.raises(ValueError, match="block_size is 48; allowed: 16, 32, 64, 128"):
        plan([48], [48], block_size=48)
    with pytest.raises(ValueError, match="num_q_heads is 7; it must be a multiple of num_kv_heads, 2"):
        plan([48], [48], num_q_heads=7)
    with pytest.raises(ValueError, match="decode_only needs one token a sequence, 1"):
        plan([48], [48], decode_only=True)
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
            plan([48], [48], **{"dtype": jnp.bfloat16, "implementation": "mosaic_gpu", **options})


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
