"""Scales of an fp8 KV cache in a checkpoint."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.weights.test_weight_loading import make_model, make_tensors
from vjax.errors import ModelLoadError
from vjax.models.functional import build_model
from vjax.parallel.sharding import make_mesh
from vjax.weights.kv_scales import read_kv_scales, round_up_to_power_of_two
from vjax.weights.loader import load_weights

ATTENTION = "model.layers.{}.self_attn."
ARCH = make_model().arch  # 2 layers, 2 KV heads


def saved(path, scales: dict[str, np.ndarray]):
    save_file({**make_tensors(make_model()), **scales}, path / "model.safetensors")
    return path


def test_rounded_up_to_powers_of_two():
    x = np.array([1, 0.5, 0.51, 3, 2.0**-126, 1e-3], np.float32)
    assert round_up_to_power_of_two(x).tolist() == [1, 0.5, 1, 4, 2.0**-126, 2.0**-9]


@pytest.mark.parametrize("names", [("attn.k_scale", "attn.v_scale"), ("k_proj.k_scale", "v_proj.v_scale")])
def test_names_of_vllm(names, tmp_path):
    scales = {ATTENTION.format(1) + name: np.float32(2.5 * (i + 1)).reshape(()) for i, name in enumerate(names)}
    found = read_kv_scales(saved(tmp_path, {name: np.asarray(x) for name, x in scales.items()}), ARCH)
    assert found is not None
    assert found["k_scale"].tolist() == [[1, 1], [4, 4]]
    assert found["v_scale"].tolist() == [[1, 1], [8, 8]]


def test_one_scale_for_both_and_one_for_each_head(tmp_path):
    scales = {
        ATTENTION.format(0) + "kv_scale": np.array([0.25], ml_dtypes.bfloat16),
        ATTENTION.format(0) + "v_proj.output_scale": np.array([0.125, 0.3], np.float32),
    }
    found = read_kv_scales(saved(tmp_path, scales), ARCH)
    assert found is not None
    assert found["k_scale"].tolist() == [[0.25, 0.25], [1, 1]]
    assert found["v_scale"].tolist() == [[0.125, 0.5], [1, 1]]


def test_none(tmp_path):
    assert read_kv_scales(saved(tmp_path, {}), ARCH) is None


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("k_scale", np.zeros(1, np.float32), "must be a positive number"),
        ("k_scale", np.ones(3, np.float32), r"has shape \[3\]; wanted \[\] or \[2\]"),
    ],
)
def test_bad_scales(name, value, text, tmp_path):
    with pytest.raises(ModelLoadError, match=text):
        read_kv_scales(saved(tmp_path, {ATTENTION.format(0) + name: value}), ARCH)


def test_a_scale_of_a_layer_that_is_not_there(tmp_path):
    with pytest.raises(ModelLoadError, match="with 2 layers"):
        read_kv_scales(saved(tmp_path, {ATTENTION.format(2) + "k_scale": np.ones(1, np.float32)}), ARCH)


def test_loaded_as_leaves_or_passed_over(tmp_path):
    scales = {ATTENTION.format(0) + "attn.k_scale": np.ones(1, np.float32) * 8}
    saved(tmp_path, {**scales, ATTENTION.format(0) + "attn.q_scale": np.ones(1, np.float32)})
    plain = load_weights(make_model(), tmp_path, mesh=make_mesh())
    model = build_model(ARCH, jnp.float32, kv_scales=True)
    given = {f"vectors.{name}": value for name, value in (read_kv_scales(tmp_path, ARCH) or {}).items()}
    leaves = dict(zip(model.leaf_names, load_weights(model, tmp_path, mesh=make_mesh(), given=given), strict=True))
    assert len(leaves) == len(plain) + 2
    assert leaves["vectors.k_scale"].tolist() == [[8, 8], [1, 1]]
