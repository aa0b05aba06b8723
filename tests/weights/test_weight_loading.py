"""Checkpoints on disk: what loads, and what is said when it does not."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vjax.errors import ModelLoadError
from vjax.models.functional import FunctionalModel, build_model
from vjax.models.registry import arch_config_from_hf
from vjax.parallel.sharding import make_mesh
from vjax.weights.checkpoint import Checkpoint
from vjax.weights.loader import load_weights
from vjax.weights.mapping import leaf_sources

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 12,
    "max_position_embeddings": 32,
}


def make_model(dtype=jnp.float32, **changes) -> FunctionalModel:
    return build_model(arch_config_from_hf({**CONFIG, **changes}), dtype)


def make_tensors(model: FunctionalModel) -> dict[str, np.ndarray]:
    """Random tensors under the names and shapes of the checkpoint, small integers so that all dtypes hold them."""
    rng = np.random.default_rng(0)
    shapes = {name: spec.shape for name, spec in model.leaf_specs.items()}
    return {
        name: rng.integers(-64, 64, shape).astype(np.float32)
        for leaf in leaf_sources(model.weight_rules, shapes, model.arch.num_layers).values()
        for group in leaf.groups
        for name, shape in zip(group, leaf.shapes, strict=True)
    }


@pytest.fixture
def model() -> FunctionalModel:
    return make_model()


@pytest.fixture
def tensors(model) -> dict[str, np.ndarray]:
    return make_tensors(model)


def load(model: FunctionalModel, path: Path, **options) -> dict[str, np.ndarray]:
    leaves = load_weights(model, path, mesh=make_mesh(), **options)
    return {name: np.asarray(leaf) for name, leaf in zip(model.leaf_names, leaves, strict=True)}


def save_sharded(path: Path, tensors: dict[str, np.ndarray], num_files: int = 3) -> list[str]:
    names = sorted(tensors)
    files = [f"model-{i + 1:05d}-of-{num_files:05d}.safetensors" for i in range(num_files)]
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in names[i::num_files]}, path / file)
    weight_map = {name: files[i % num_files] for i, name in enumerate(names)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def test_packing(model, tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    leaves = load(model, tmp_path)
    layer = "model.layers.1.self_attn."
    q, k, v = (tensors[f"{layer}{name}_proj.weight"] for name in "qkv")
    qkv = leaves["layers.1.attention.qkv"]
    for kv_head in range(2):
        for member in range(2):
            head = kv_head * 2 + member
            np.testing.assert_array_equal(qkv[:, kv_head, member], q[head * 4 : head * 4 + 4].T)
        np.testing.assert_array_equal(qkv[:, kv_head, 2], k[kv_head * 4 : kv_head * 4 + 4].T)
        np.testing.assert_array_equal(qkv[:, kv_head, 3], v[kv_head * 4 : kv_head * 4 + 4].T)
    np.testing.assert_array_equal(leaves["vectors.qkv_bias"][1, 1, 3], tensors[f"{layer}v_proj.bias"][4:])
    np.testing.assert_array_equal(leaves["layers.1.attention.o"].reshape(16, 8), tensors[f"{layer}o_proj.weight"].T)
    gate_up = leaves["layers.0.mlp.gate_up"]
    np.testing.assert_array_equal(gate_up[:, 0], tensors["model.layers.0.mlp.gate_proj.weight"].T)
    np.testing.assert_array_equal(gate_up[:, 1], tensors["model.layers.0.mlp.up_proj.weight"].T)
    np.testing.assert_array_equal(leaves["layers.0.mlp.down"], tensors["model.layers.0.mlp.down_proj.weight"].T)
    np.testing.assert_array_equal(
        leaves["vectors.mlp_norm"],
        np.stack([tensors[f"model.layers.{i}.post_attention_layernorm.weight"] for i in range(2)]),
    )
    np.testing.assert_array_equal(leaves["embed"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(leaves["lm_head"], tensors["lm_head.weight"])


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes_are_converted(tensors, tmp_path, stored, wanted):
    save_file({name: tensor.astype(stored) for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    leaves = load(make_model(wanted), tmp_path)
    assert all(leaf.dtype == wanted for leaf in leaves.values())
    np.testing.assert_array_equal(leaves["embed"].astype(np.float32), tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(
        leaves["vectors.qkv_bias"][0, 0, 2], tensors["model.layers.0.self_attn.k_proj.bias"][:4]
    )


def test_several_files(model, tensors, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    save_sharded(tmp_path / "many", tensors)
    # The publisher's own format beside it does not count.
    save_file({"tok_embeddings.weight": np.ones(3, np.float32)}, tmp_path / "many" / "consolidated.safetensors")
    expected = load(model, tmp_path / "one")
    for name, leaf in load(model, tmp_path / "many").items():
        np.testing.assert_array_equal(leaf, expected[name])
    (tmp_path / "many" / "model.safetensors.index.json").unlink()
    assert load(model, tmp_path / "many").keys() == expected.keys()


def test_harmless_extras(tmp_path):
    model = make_model(tie_word_embeddings=True)
    tensors = make_tensors(model)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    assert "lm_head" not in load(model, tmp_path)


def test_all_problems_are_reported_together(model, tensors, tmp_path):
    del tensors["model.norm.weight"]
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.experts.weight"] = np.ones((2, 3), np.float32)
    tensors["lm_head.weight"] = np.ones((21, 8), np.float32)
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.ones((16, 8), np.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError) as error:
        load(model, tmp_path)
    text = str(error.value)
    assert str(tmp_path) in text
    assert "2 missing tensors:" in text and "model.norm.weight [8]" in text
    assert "model.layers.1.mlp.up_proj.weight [12, 8]" in text
    assert "1 unexpected tensors:\n  model.layers.0.mlp.experts.weight [2, 3]" in text
    assert "lm_head.weight: [21, 8] in the checkpoint, [20, 8] from config.json" in text
    assert "model.layers.0.self_attn.q_proj.weight: I8" in text


def test_long_lists_are_cut(tmp_path):
    model = make_model(num_hidden_layers=8)
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"99 missing tensors:(.*\n)+.*and 79 more"):
        load(model, tmp_path)


def test_no_weights(model, tmp_path):
    with pytest.raises(ModelLoadError, match="has no weights"):
        load(model, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin: convert"):
        load(model, tmp_path)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_file(model, tensors, tmp_path, size):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is no intact safetensors file"):
        load(model, tmp_path)


def test_bad_index(model, tensors, tmp_path):
    files = save_sharded(tmp_path, tensors)
    (tmp_path / files[1]).unlink()
    with pytest.raises(ModelLoadError, match=f"1 are missing: {files[1]}"):
        load(model, tmp_path)
    for content in ("{", "{}", '{"weight_map": []}', "[]"):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ModelLoadError, match="cannot be read as a safetensors index"):
            load(model, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ModelLoadError, match="names no files"):
        load(model, tmp_path)


def test_a_tensor_in_two_files(tensors, tmp_path):
    for name in ("a", "b"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelLoadError, match=r"b\.safetensors holds the tensor .* and so does a\.safetensors"):
        Checkpoint(tmp_path)


def test_load_format(model, tmp_path):
    with pytest.raises(ModelLoadError, match="load_format is 'pt'"):
        load(model, tmp_path, load_format="pt")


def test_dummy_weights(tmp_path):
    model = make_model(jnp.bfloat16, vocab_size=2048, hidden_size=64)
    leaves = load(model, tmp_path / "nowhere", load_format="dummy")
    assert all(leaf.dtype == ml_dtypes.bfloat16 for leaf in leaves.values())
    assert (leaves["norm"] == 1).all() and (leaves["vectors.attention_norm"] == 1).all()
    embed = leaves["embed"].astype(np.float32)
    assert abs(embed.mean()) < 2e-5 and abs(embed.std() - 1e-3 / 3**0.5) < 2e-5 and abs(embed).max() <= 1e-3
    assert not np.array_equal(leaves["layers.0.mlp.down"], leaves["layers.1.mlp.down"])
    again = load(model, tmp_path / "nowhere", load_format="dummy")
    other = load(model, tmp_path / "nowhere", load_format="dummy", seed=1)
    np.testing.assert_array_equal(leaves["embed"], again["embed"])
    assert not np.array_equal(leaves["embed"], other["embed"])


def test_a_loaded_leaf_does_not_depend_on_the_file(model, tensors, tmp_path):
    path, name = tmp_path / "model.safetensors", "model.embed_tokens.weight"
    for padding in range(0, 64, 8):
        save_file(tensors, path, metadata={"padding": " " * padding})
        if Checkpoint(tmp_path).read(name).ctypes.data % 64 == 0:
            break  # memory that JAX could take as it is
    else:
        pytest.fail("the tensor is aligned nowhere")
    leaves = load_weights(model, tmp_path, mesh=make_mesh())
    with path.open("r+b") as file:  # in place, as the file is mapped
        file.write(b"\0" * path.stat().st_size)
    embed = leaves[model.leaf_names.index("embed")]
    np.testing.assert_array_equal(embed, tensors[name])
    assert isinstance(embed, jax.Array) and embed.committed


def test_tensors_are_read_one_leaf_at_a_time(model, tensors, tmp_path, monkeypatch):
    save_file(tensors, tmp_path / "model.safetensors")
    reads: list[str] = []
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: (reads.append(name), read(self, name))[1])
    load(model, tmp_path)
    assert sorted(reads) == sorted(load_file(tmp_path / "model.safetensors"))
