"""Configurations of the decode kernels that a sweep may choose, compiled to sm_90a machine code without a GPU."""

from __future__ import annotations

import pytest

from pallas_kernels.ragged_paged_attention.shapes import MODELS
from tests.kernels.test_hopper_compile import check, pytestmark, report  # noqa: F401

PROGRAM = """
from pallas_kernels.ragged_paged_attention.mosaic_decode import decode_attention
from pallas_kernels.ragged_paged_attention.plan_decode import DecodeConfig, DecodeShape, plan_decode
def decode(heads, kv_heads, head_dim, block_size, num_seqs, q_len, window, options, config, sinks=False):
    shape = DecodeShape(num_seqs * q_len, heads, kv_heads, head_dim, block_size, q_len, window)
    cache = spec((NUM_BLOCKS, kv_heads, block_size, head_dim), jnp.bfloat16)
    q = spec((num_seqs * q_len, heads, head_dim), jnp.bfloat16)
    def function(q, k_cache, v_cache, logits, *metadata):
        plan = plan_decode(*metadata, shape, DecodeConfig(**config))
        return decode_attention(q, k_cache, v_cache, plan, scale=0.1,
                                sinks=logits if sinks else None, **options)
    metadata = [spec((257, 8448 // block_size)), spec((num_seqs,)), spec((num_seqs + 1,)), spec((num_seqs,))]
    text = compile(function, q, cache, cache, spec((heads,), jnp.float32), *metadata)
    print("COPIES", len(cache_copies(text, [cache.shape])))
"""
WINDOW = {"soft_cap": 30.0}
# (model, block size, sequences, tokens of each, window, options, config, sinks)
DECODES = {
    "batch": [
        ("llama3_8b", 16, 64, 1, None, {}, {"heads": 8, "stages": 6}, False),
        ("llama3_8b", 16, 64, 1, None, {}, {"heads": 4, "columns": 64, "stages": 5, "streams": 2}, True),
        ("qwen2_7b", 32, 64, 1, None, {}, {"heads": 4, "stages": 6}, False),
    ],
    "window": [
        ("llama3_8b", 16, 64, 1, 1024, WINDOW, {"heads": 8, "stages": 6}, True),
        ("llama3_8b", 16, 64, 4, 1024, WINDOW, {"heads": 2, "columns": 64, "stages": 12}, True),
        ("llama3_1b", 16, 64, 1, 128, {}, {"heads": 8, "stages": 5, "streams": 2}, True),
    ],
    "few": [
        ("llama3_70b_tp8", 128, 4, 8, None, {}, {"heads": 1, "stages": 6}, False),
        ("llama3_8b", 16, 1, 1, None, {}, {"heads": 2, "columns": 64, "stages": 10, "unroll": 16}, False),
    ],
}


@pytest.mark.parametrize("name", DECODES)
def test_decode(name: str):
    calls = [f"decode(*{(*MODELS[model], *rest)})" for model, *rest in DECODES[name]]
    check(report("\n".join([PROGRAM.replace("NUM_BLOCKS", "20011"), *calls])), len(calls))
