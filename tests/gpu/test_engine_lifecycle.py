"""Engines come and go in one process: what they held on the device is free again, each time."""

from __future__ import annotations

import json

import pytest

from tests.gpu.engines import (
    device_bytes,
    generated_ids,
    greedy,
    make_llm,
    peak_device_bytes,
    settled_device_bytes,
)

pytestmark = pytest.mark.gpu

NUM_ENGINES = 10
#: What JAX itself may keep once: constants of the first engine's helpers.
SLACK = 1 << 20
#: Temporaries and the scratch of GEMM autotuning.
SCRATCH = 2 << 30
#: A Llama-3.2-1B with a smaller vocabulary; 0.95 billion parameters.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 256}


@pytest.fixture
def dummy_model(tmp_path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


def _engine(turn: int, dummy_model: str):
    """The bundled model and random weights of a large one in turn."""
    if turn % 2 == 0:
        return make_llm(**LIMITS)
    return make_llm(dummy_model, load_format="dummy", skip_tokenizer_init=True, kv_cache_memory_bytes=3 << 30, **LIMITS)


def test_engines_give_their_memory_back(dummy_model, say):
    """Ten engines, ended in turn by shutdown, at the end of a with block and by dropping the last reference."""
    before, peak_before, during, after = device_bytes(), peak_device_bytes(), [], []
    for turn in range(NUM_ENGINES):
        llm = _engine(turn, dummy_model)
        (ids,) = generated_ids(llm, [[5, 6, 7]], greedy(8))
        assert len(ids) == 8
        during.append(device_bytes())
        if turn % 3 == 0:
            llm.shutdown()
        elif turn % 3 == 1:
            with llm:
                pass
        del llm
        after.append(settled_device_bytes(after[1] if turn > 1 else before))
    say(f"\nbytes in use: {before} before; with an engine {during}; then {after}; largest ever {peak_device_bytes()}")
    assert min(during) > before + (256 << 20)
    assert max(after) <= before + SLACK
    # After the first of each kind nothing is added at all.
    assert after[2:] == [after[1]] * (NUM_ENGINES - 2)
    # No engine shared the device with what another one left.
    assert peak_device_bytes() <= max(peak_before, max(during) + SCRATCH)


def test_an_engine_that_does_not_fit_leaves_nothing(dummy_model):
    """Also while the exception lives, as it does in a notebook, where the next cell tries again."""
    before = device_bytes()
    with pytest.raises(ValueError, match="kv_cache_memory_bytes") as held:
        make_llm(dummy_model, load_format="dummy", skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 20, **LIMITS)
    assert settled_device_bytes(before + SLACK) <= before + SLACK, held.value


def test_an_engine_without_a_tokenizer_leaves_nothing(dummy_model):
    before = device_bytes()
    with pytest.raises(ValueError, match="skip_tokenizer_init") as held:
        make_llm(dummy_model, load_format="dummy", **LIMITS)
    assert settled_device_bytes(before + SLACK) <= before + SLACK, held.value
