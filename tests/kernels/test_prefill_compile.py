"""The prefill kernel compiled to sm_90a machine code without a GPU, at the shapes of real models."""

from __future__ import annotations

from pallas_kernels.ragged_paged_attention.shapes import MODELS
from tests.kernels.test_hopper_compile import check, pytestmark, report  # noqa: F401

PROGRAM = """
from pallas_kernels.ragged_paged_attention.mosaic_prefill import Config, prefill_attention
from pallas_kernels.ragged_paged_attention.plan_prefill import plan_prefill
def prefill(heads, kv_heads, head_dim, block_size, num_tokens, num_seqs, config, options):
    config, options = Config(**config), dict(options)
    dtype = options.pop("dtype", jnp.bfloat16)
    with_sinks = options.pop("sinks", False)
    cache, q = spec((20011, kv_heads, block_size, head_dim), dtype), spec((num_tokens, heads, head_dim), dtype)
    def function(q, k_cache, v_cache, out, sinks, *metadata):
        plan = plan_prefill(
            *metadata, num_tokens=num_tokens, tile_tokens=config.tile_tokens, block_size=block_size, min_tokens=2)
        return prefill_attention(
            q, k_cache, v_cache, plan, out, scale=0.1, sinks=sinks if with_sinks else None, config=config, **options)
    metadata = [spec((257, 8448 // block_size)), spec((num_seqs,)), spec((num_seqs + 1,)), spec((num_seqs,))]
    text = compile(function, q, cache, cache, q, spec((heads,), jnp.float32), *metadata, donate=(3,))
    print("COPIES", len(cache_copies(text, [cache.shape, q.shape])))
"""
WINDOW_AND_CAP = {"sliding_window": 1024, "soft_cap": 30.0, "sinks": True}
TWO_HEADS = {"tile_tokens": 64, "tile_keys": 64, "stages": 4}
THREE = {"warpgroups": 3, "tile_tokens": 192, "tile_keys": 64, "stages": 3, "registers": (160, 32)}
# (model, block size, tokens, sequences, config, options): what test_hopper_compile.py does not compile, which has the
# default configuration with each head dim and all options.
PREFILLS = [
    ("llama3_8b", 16, 2048, 64, TWO_HEADS, WINDOW_AND_CAP),
    ("llama3_8b", 16, 2048, 64, {"tile_tokens": 32}, {}),
    ("llama3_8b", 16, 2048, 64, THREE, {}),
    ("llama2_7b", 128, 2048, 64, {}, {}),
    ("qwen2_7b", 32, 2048, 64, {}, {"dtype": "float16"}),
]


def test_prefill():
    calls = [f"prefill(*{(*MODELS[model], *rest)})" for model, *rest in PREFILLS]
    check(report("\n".join([PROGRAM, *calls])), len(calls))
