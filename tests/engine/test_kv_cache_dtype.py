"""kv_cache_dtype="fp8": twice the blocks of a 16-bit cache, and nearly the same tokens."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import harness
from vjax import LLM, ConfigError, SamplingParams
from vjax.models.functional import build_model
from vjax.models.registry import arch_config_from_hf, read_hf_config
from vjax.parallel.sharding import make_mesh
from vjax.weights.hub import resolve_model_path
from vjax.weights.loader import load_weights

SMALL = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 128, "kv_cache_memory_bytes": 8 << 20}
PROMPTS = ["def read_lines(path):\n", "import os\n\ndef walk", "class Stack:\n    def push(self"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=16)


def test_four_times_the_blocks_of_float32_and_mostly_its_tokens():
    tokens, blocks = {}, {}
    for dtype in ("auto", "fp8"):
        with LLM("vjax-tiny", kv_cache_dtype=dtype, **SMALL) as llm:
            tokens[dtype] = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
            blocks[dtype] = llm.llm_engine.config.cache.num_gpu_blocks
            # What one request left in the prefix cache serves the next.
            assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)] == tokens[dtype]
    assert blocks["fp8"] == 4 * blocks["auto"]
    assert [t[:4] for t in tokens["fp8"]] == [t[:4] for t in tokens["auto"]]


def test_another_16_bit_dtype_than_the_models_is_refused():
    with pytest.raises(ConfigError, match="kv_cache_dtype='bfloat16' does not fit a model of dtype float32"):
        LLM("vjax-tiny", kv_cache_dtype="bfloat16", **SMALL)


@pytest.mark.parametrize("scale", [None, 0.25])
def test_logits_with_an_fp8_cache(scale: float | None):
    path = resolve_model_path("vjax-tiny")
    arch = arch_config_from_hf(read_hf_config(path))
    given = {}
    if scale is not None:
        given = {f"vectors.{name}_scale": np.full((arch.num_layers, arch.num_kv_heads), scale, "f") for name in "kv"}
    model = build_model(arch, jnp.float32, kv_scales=bool(given))
    leaves = load_weights(model, path, mesh=make_mesh(), given=given)
    table = np.array([[0] * 4, [4, 3, 2, 1]], np.int32)
    prompt = np.random.default_rng(0).integers(1, 4000, 60).tolist()
    exact = harness.prompt_logits(str(path), prompt)
    shape = (5, arch.num_kv_heads, harness.BLOCK_SIZE, arch.head_dim)
    cache = tuple((jnp.zeros(shape, jnp.float8_e4m3fn),) * 2 for _ in range(arch.num_layers))
    logits, kv = harness.run_step(model, leaves, cache, table, [(prompt, 0)])
    assert kv[0][0].dtype == jnp.float8_e4m3fn
    error = np.linalg.norm(logits - exact) / np.linalg.norm(exact - exact.mean(-1, keepdims=True))
    assert 1e-4 < error < 0.1, error
