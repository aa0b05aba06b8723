"""Frequencies against transformers', for the parameters of real models."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import rope_write_kv
from vjax.layers.rope import inverse_frequencies, rope_cos_sin
from vjax.models.arch import RopeConfig
from vjax.models.rope_config import rope_config_from_hf

CASES = {
    "default": ({"rope_type": "default", "rope_theta": 1e6}, 128, 32768),
    "linear": ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, 128, 4096),
    "dynamic": ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, 80, 4096),
    "llama-3.1": (
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        128,
        131072,
    ),
    "qwen2.5-yarn": (
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
        128,
        32768,
    ),
    "yarn-attention-factor": (
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "attention_factor": 1.25,
            "truncate": False,
        },
        64,
        131072,
    ),
    "yarn-mscale": (
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 0.8,
            "beta_fast": 48.0,
            "beta_slow": 2.0,
        },
        64,
        163840,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_equal_transformers(name):
    pytest.importorskip("torch", reason="transformers computes frequencies in torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters, head_dim, max_position_embeddings = CASES[name]
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        max_position_embeddings=max_position_embeddings,
        rope_parameters=dict(parameters),
    )
    expected = LlamaRotaryEmbedding(config)
    rope = rope_config_from_hf({"rope_parameters": parameters, "max_position_embeddings": max_position_embeddings})
    inv_freq, attention_factor = inverse_frequencies(rope, head_dim)
    assert inv_freq.dtype == np.float32 and inv_freq.shape == (head_dim // 2,)
    np.testing.assert_allclose(inv_freq, expected.inv_freq.numpy(), rtol=3e-7)
    assert attention_factor == pytest.approx(expected.attention_scaling, rel=1e-12)


def test_rotation_keeps_norms_and_depends_on_distance_only():
    rope = RopeConfig(theta=1e4)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 16)), jnp.float32)

    def scores(shift: int) -> np.ndarray:
        cos, sin = rope_cos_sin(jnp.array([shift, shift + 7], jnp.int32), rope, 16)
        cache = jnp.zeros((1, 3, 16, 16), jnp.float32)
        slots = jnp.full(2, -1, jnp.int32)
        rotated, _, _ = rope_write_kv((x, x, x), cos, sin, cache, cache, slots, implementation="xla")
        np.testing.assert_allclose(jnp.linalg.norm(rotated, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
        return np.asarray(jnp.sum(rotated[0] * rotated[1], axis=-1))

    np.testing.assert_allclose(scores(0), scores(1000), atol=2e-3)
