"""Real checkpoints map name by name and shape by shape onto the leaves, without their weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax.numpy as jnp
import pytest

from vjax.errors import ModelLoadError
from vjax.models.functional import build_model
from vjax.models.registry import arch_config_from_hf
from vjax.weights.mapping import TensorInfo, check_tensors, leaf_sources
from vjax.weights.packing import PACKERS

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.json"))
BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def tensors_of(fixture: dict) -> dict[str, TensorInfo]:
    num_layers = fixture["config"]["num_hidden_layers"]
    return {
        name.replace("{layer}", str(layer)): TensorInfo(tuple(shape), dtype)
        for name, (dtype, shape) in fixture["tensors"].items()
        for layer in (range(num_layers) if "{layer}" in name else (0,))
    }


def load(path: Path):
    fixture = json.loads(path.read_text())
    model = build_model(arch_config_from_hf(fixture["config"]), jnp.bfloat16)
    shapes = {name: spec.shape for name, spec in model.leaf_specs.items()}
    return fixture, model, leaf_sources(model.weight_rules, shapes, model.arch.num_layers)


def test_the_families_are_there():
    assert len(FIXTURES) >= 14


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_every_tensor_maps_and_every_leaf_is_filled_once(path):
    fixture, model, sources = load(path)
    tensors = tensors_of(fixture)
    check_tensors(sources, tensors, where=path.stem)

    names = [name for leaf in sources.values() for group in leaf.groups for name in group]
    assert len(names) == len(set(names))
    extras = {name for name in set(tensors) - set(names) if "inv_freq" not in name}
    assert extras <= ({"lm_head.weight"} if model.arch.tie_word_embeddings else set())
    for name, leaf in sources.items():
        elements = sum(math.prod(tensors[tensor].shape) for group in leaf.groups for tensor in group)
        assert elements == math.prod(model.leaf_specs[name].shape), name
    assert len(model.leaf_names) < 300


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_the_fixture_has_the_published_size(path):
    fixture = json.loads(path.read_text())
    tensors = tensors_of(fixture).values()
    totals = {
        "bytes": sum(BYTES[info.dtype] * math.prod(info.shape) for info in tensors),
        "parameters": sum(math.prod(info.shape) for info in tensors),
        "tensors": len(tensors),
    }
    for unit, published in fixture["published"].items():
        assert totals[unit] == published, unit


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_packed_leaves_have_their_declared_shape(path):
    _, model, sources = load(path)
    import jax

    for name, leaf in sources.items():
        spec = jax.eval_shape(
            lambda *tensors, leaf=leaf: PACKERS[leaf.packing].pack(jnp, list(tensors), leaf.packed_shape),
            *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in leaf.shapes),
        )
        stack = (len(leaf.groups),) if leaf.stacked else ()
        assert stack + spec.shape == model.leaf_specs[name].shape, name


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("llama-2-7b", {"num_kv_heads": 32, "head_dim": 128, "eos_token_ids": (2,), "torch_dtype": "float16"}),
        ("llama-3.1-8b-instruct", {"eos_token_ids": (128001, 128008, 128009), "max_context_len": 131072}),
        ("llama-3.2-1b", {"tie_word_embeddings": True, "head_dim": 64}),
        ("mistral-7b-v0.1", {"sliding_windows": (4096,) * 32}),
        ("dolphin3.0-mistral-24b", {"sliding_windows": (None,) * 40, "head_dim": 128}),
        ("qwen2.5-0.5b-instruct", {"qkv_bias": True, "o_bias": False, "sliding_windows": (None,) * 24}),
        ("qwen2.5-1.5b-transformers5", {"torch_dtype": "bfloat16", "sliding_windows": (None,) * 28}),
        ("qwen3-0.6b", {"qk_norm": True, "head_dim": 128, "qkv_bias": False, "hidden_size": 1024}),
    ],
)
def test_fields_of_real_configs(stem, expected):
    fixture = json.loads((Path(__file__).parent / "fixtures" / f"{stem}.json").read_text())
    arch = arch_config_from_hf(fixture["config"])
    assert {name: getattr(arch, name) for name in expected} == expected


def test_rope_of_real_configs():
    def rope(stem: str):
        fixture = json.loads((Path(__file__).parent / "fixtures" / f"{stem}.json").read_text())
        return arch_config_from_hf(fixture["config"]).rope

    assert (rope("llama-2-7b").rope_type, rope("llama-2-7b").theta) == ("default", 10000.0)
    assert rope("codellama-7b").theta == 1e6
    assert rope("qwen2.5-1.5b-transformers5").theta == 1e6
    llama = rope("llama-3.2-1b")
    assert (llama.rope_type, llama.factor, llama.original_max_position_embeddings) == ("llama3", 32.0, 8192)


def test_a_wrong_config_is_caught_by_shapes():
    fixture, _, _ = load(FIXTURES[0])
    config = {**fixture["config"], "intermediate_size": fixture["config"]["intermediate_size"] + 256}
    model = build_model(arch_config_from_hf(config), jnp.bfloat16)
    shapes = {name: spec.shape for name, spec in model.leaf_specs.items()}
    sources = leaf_sources(model.weight_rules, shapes, model.arch.num_layers)
    with pytest.raises(ModelLoadError, match="wrong shape"):
        check_tensors(sources, tensors_of(fixture), where="test")
