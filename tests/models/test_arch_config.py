"""config.json in its spellings, and the names of what is not supported."""

from __future__ import annotations

import json

import pytest

from vjax.errors import ModelLoadError
from vjax.models.arch import RopeConfig
from vjax.models.registry import (
    POOLING_MODELS,
    arch_config_from_hf,
    get_model_class,
    read_hf_config,
    supported_architectures,
)

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"]}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"]}


def test_defaults():
    arch = arch_config_from_hf(LLAMA)
    assert (arch.head_dim, arch.heads_per_kv, arch.rms_norm_eps) == (16, 2, 1e-6)
    assert arch.rope == RopeConfig() and not arch.tie_word_embeddings
    assert arch.eos_token_ids == () and arch.bos_token_id is None and arch.torch_dtype is None
    without_kv = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert arch_config_from_hf(without_kv).num_kv_heads == 4
    assert arch_config_from_hf({**QWEN3, "head_dim": None}).head_dim == 128
    assert hash(arch) == hash(arch_config_from_hf(dict(LLAMA)))


def test_dtype_spellings():
    assert arch_config_from_hf({**LLAMA, "torch_dtype": "bfloat16"}).torch_dtype == "bfloat16"
    assert arch_config_from_hf({**LLAMA, "dtype": "torch.float16"}).torch_dtype == "float16"


ROPES = [
    {"type": "linear", "factor": 2.0},
    {"type": "dynamic", "factor": 4.0},
    {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": 64,
    },
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16, "mscale": 0.5},
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["type"])
def test_rope_spellings_agree(rope):
    rest = {key: value for key, value in rope.items() if key != "type"}
    new = {"rope_type": rope["type"], "rope_theta": 5e5, **rest}
    spellings = [
        {"rope_theta": 5e5, "rope_scaling": rope},
        {"rope_theta": 5e5, "rope_scaling": {**rope, "rope_type": rope["type"]}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": rope["type"], **rest}},
        {"rope_parameters": new},
        {"rope_parameters": {"full_attention": new, "sliding_attention": dict(new)}},
        {"rope_theta": 5e5, "rope_parameters": {**new, "rope_theta": None}},
    ]
    parsed = [arch_config_from_hf({**LLAMA, **spelling}).rope for spelling in spellings]
    assert all(config == parsed[0] for config in parsed)
    assert (parsed[0].rope_type, parsed[0].theta, parsed[0].factor) == (rope["type"], 5e5, rope["factor"])


def test_original_max_position_embeddings_falls_back():
    rope = {"rope_type": "yarn", "factor": 4.0}
    assert arch_config_from_hf({**LLAMA, "rope_scaling": rope}).rope.original_max_position_embeddings == 128
    outside = {**LLAMA, "rope_scaling": rope, "original_max_position_embeddings": 32}
    assert arch_config_from_hf(outside).rope.original_max_position_embeddings == 32


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, 128),
        ({"type": "linear", "factor": 2.0}, 256),
        ({"type": "dynamic", "factor": 4.0}, 128),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        (ROPES[2], 128),
    ],
)
def test_max_context_len(rope, expected):
    assert arch_config_from_hf({**LLAMA, "rope_scaling": rope}).max_context_len == expected


def test_sliding_windows():
    assert arch_config_from_hf({**MISTRAL, "sliding_window": 32}).sliding_windows == (32,) * 4
    assert arch_config_from_hf({**MISTRAL, "sliding_window": None}).sliding_windows == (None,) * 4
    assert arch_config_from_hf(MISTRAL).sliding_windows == (4096,) * 4
    off = {**QWEN2, "sliding_window": 32, "max_window_layers": 2, "use_sliding_window": False}
    assert arch_config_from_hf(off).sliding_windows == (None,) * 4
    on = {**off, "use_sliding_window": True}
    assert arch_config_from_hf(on).sliding_windows == (None, None, 32, 32)
    types = ["sliding_attention", "full_attention"] * 2
    assert arch_config_from_hf({**on, "layer_types": types}).sliding_windows == (32, None, 32, None)


def test_biases_and_norms():
    llama = arch_config_from_hf({**LLAMA, "attention_bias": True, "mlp_bias": True})
    assert llama.qkv_bias and llama.o_bias and llama.mlp_bias and not llama.qk_norm
    qwen2, qwen3 = arch_config_from_hf(QWEN2), arch_config_from_hf(QWEN3)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm) == (False, False, True)


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (LLAMA, {"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel'.*supported are LlamaForCausalLM"),
        (LLAMA, {"architectures": None}, "architectures is None"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*'gptq'"),
        (LLAMA, {"quantization": {"bits": 4}}, "quantization"),
        (LLAMA, {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "needs the keys factor"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'"),
        (LLAMA, {"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section"),
        (LLAMA, {"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2}}, "must agree"),
        (LLAMA, {"rope_scaling": "linear"}, "'linear'"),
        (LLAMA, {"rope_scaling": {**ROPES[2], "low_freq_factor": 4}}, "high_freq_factor > low_freq_factor"),
        (LLAMA, {"rope_parameters": {"a": {"rope_theta": 1.0}, "b": {"rope_theta": 2.0}}}, "differ between"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (LLAMA, {"sliding_window": 64}, "sliding_window is 64"),
        (LLAMA, {"head_dim": 15}, "head_dim is 15"),
        (LLAMA, {"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        (LLAMA, {"vocab_size": None}, "no 'vocab_size'"),
        (LLAMA, {"hidden_size": "64"}, "hidden_size is '64'"),
        (LLAMA, {"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'"),
        (LLAMA, {"rope_theta": "big"}, "rope_theta is 'big'"),
        (MISTRAL, {"layer_types": ["full_attention"] * 4}, "layer_types"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window is 0"),
        (QWEN2, {"use_mrope": True}, "use_mrope"),
        (QWEN2, {"layer_types": ["linear_attention"] * 4}, "linear_attention"),
        (QWEN2, {"layer_types": ["full_attention"] * 3}, "3 entries for 4 layers"),
        (QWEN2, {"layer_types": ["sliding_attention"] * 4}, "sliding_window is not set"),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": "x"}, "max_window_layers"),
    ],
)
def test_what_is_not_supported_is_named(base, change, message):
    with pytest.raises(ModelLoadError, match=message):
        arch_config_from_hf({**base, **change})


def test_read_hf_config(tmp_path):
    with pytest.raises(ModelLoadError, match=r"config\.json does not exist"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="cannot be read as JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelLoadError, match="JSON object"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_hf_config(str(tmp_path)) == LLAMA


def test_registry():
    for architecture in supported_architectures():
        arch = arch_config_from_hf({**LLAMA, "architectures": [architecture]})
        base, head = POOLING_MODELS.get(architecture, (architecture, "lm"))
        assert (get_model_class(arch).__name__, arch.head) == (base, head)
