"""Logits against transformers in float32, for every architecture feature."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import harness
from tests.models.checkpoints import CHECKPOINTS, VOCAB_SIZE, hf_logits, make_checkpoint
from vjax.models.functional import build_model

pytest.importorskip("torch", reason="Hugging Face in torch is the oracle")

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    return lambda name: make_checkpoint(name, directory)


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, length).tolist()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_of_a_prompt(checkpoints, name):
    path, prompt = checkpoints(name), random_prompt(100)
    # Head dims that the GPU kernels do not know run in a padded cache.
    head_dim = 128 if name in ("llama-head80", "llama-head96") else None
    logits = harness.prompt_logits(path, prompt, head_dim)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, hf_logits(path, prompt), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["llama-llama3", "mistral-window", "qwen3"])
def test_logits_of_two_prompts_in_chunks_with_padding(checkpoints, name):
    path = checkpoints(name)
    prompts = [random_prompt(61, 1), random_prompt(37, 2)]
    model, leaves = harness.load(path)
    table = np.zeros((3, 4), np.int32)
    table[1], table[2] = [7, 2, 5, 1], [4, 8, 3, 6]
    kv = harness.empty_cache(model, 9)
    parts: list[list[np.ndarray]] = [[], []]
    for cuts in ((20, 33), (60, 34), (61, 37)):
        chunks, sizes = [], []
        for prompt, logits, cut in zip(prompts, parts, cuts, strict=True):
            start = sum(map(len, logits))
            chunks.append((prompt[start:cut], start))
            sizes.append(cut - start)
        out, kv = harness.run_step(model, leaves, kv, table, chunks, num_padding=5)
        parts[0].append(out[: sizes[0]])
        parts[1].append(out[sizes[0] :])
    for prompt, logits in zip(prompts, parts, strict=True):
        np.testing.assert_allclose(np.concatenate(logits), hf_logits(path, prompt), atol=TOLERANCE, rtol=0)
    assert all(not np.asarray(k)[0].any() for k, _ in kv), "padding wrote into the null block"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama-linear", "rope"),
        ("llama-llama3", "rope"),
        ("llama-yarn", "rope"),
        ("llama-gqa", "rope"),
        ("mistral-window", "sliding_windows"),
        ("qwen2-tied-window", "sliding_windows"),
    ],
)
def test_the_feature_matters(checkpoints, name, change):
    """Without the feature the logits are far off: the parity above is not vacuous."""
    path, prompt = checkpoints(name), random_prompt(100)
    model, leaves = harness.load(path)
    plain = {
        "rope": dataclasses.replace(model.arch.rope, rope_type="default", theta=10000.0),
        "sliding_windows": (None,) * model.arch.num_layers,
    }[change]
    without = build_model(dataclasses.replace(model.arch, **{change: plain}), model.dtype)
    table = np.arange(14, dtype=np.int32).reshape(2, 7)
    logits, _ = harness.run_step(without, leaves, harness.empty_cache(without, 14), table, [(prompt, 0)])
    assert np.abs(logits - hf_logits(path, prompt)).max() > 100 * TOLERANCE


def test_bfloat16_is_close_to_float32(checkpoints):
    path, prompt = checkpoints("qwen3"), random_prompt(50)
    model, leaves = harness.load(path, jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in leaves)
    table = np.arange(8, dtype=np.int32).reshape(2, 4)
    logits, kv = harness.run_step(model, leaves, harness.empty_cache(model, 8), table, [(prompt, 0)])
    assert logits.dtype == np.float32 and kv[0][0].dtype == jnp.bfloat16
    error = np.abs(logits - hf_logits(path, prompt))
    assert error.mean() < 0.03 and error.max() < 0.5
