"""Tiny random checkpoints of models that pool, and transformers' own answers for them (torch, CPU, float32)."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.models.checkpoints import _BASE, CHECKPOINTS

#: name -> (transformers model type, class of `transformers` without "Auto", what differs from the base).
POOLING_CHECKPOINTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama-bare": ("llama", "Model", {}),
    "qwen2-causal": ("qwen2", "ModelForCausalLM", CHECKPOINTS["qwen2-tied-window"][1]),
    "qwen3-bare": ("qwen3", "Model", {"matryoshka_dimensions": [16, 32]}),
    "mistral-causal": ("mistral", "ModelForCausalLM", {"sliding_window": 24}),
    "llama-classes": ("llama", "ModelForSequenceClassification", {"num_labels": 3}),
    "qwen3-reranker": ("qwen3", "ModelForSequenceClassification", {"num_labels": 1, "tie_word_embeddings": True}),
}


def make_pooling_checkpoint(name: str, directory: Path) -> str:
    """Writes the checkpoint below `directory` unless it is there, and returns its path."""
    path = directory / f"pooling-{name}"
    if (path / "config.json").exists():
        return str(path)
    import torch
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    model_type, kind, fields = POOLING_CHECKPOINTS[name]
    config = transformers.AutoConfig.for_model(model_type, **{**_BASE, **fields})
    torch.manual_seed(len(name))
    model = getattr(transformers, f"Auto{kind}").from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(path)
    return str(path)


def make_reward_checkpoint(directory: Path) -> tuple[str, dict[str, np.ndarray]]:
    """A checkpoint of Qwen2ForProcessRewardModel, which transformers does not have, and the tensors of its head."""
    from safetensors.numpy import load_file, save_file

    source = Path(make_pooling_checkpoint("qwen2-causal", directory))
    rng = np.random.default_rng(3)
    shapes = {"score.0.weight": (64, 64), "score.0.bias": (64,), "score.2.weight": (2, 64), "score.2.bias": (2,)}
    head = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    path = directory / "pooling-reward"
    path.mkdir(exist_ok=True)
    save_file(load_file(source / "model.safetensors") | head, path / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen2ForProcessRewardModel"]}))
    return str(path), head


@functools.lru_cache(maxsize=4)
def _model(path: str, kind: str) -> Any:
    import torch
    import transformers

    model = getattr(transformers, f"Auto{kind}")
    return model.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def hf_states(path: str, prompt: list[int]) -> np.ndarray:
    """States of the prompt's tokens after the final norm, f32 `[tokens, hidden]`."""
    import torch

    with torch.no_grad():
        return _model(path, "Model")(torch.tensor([prompt])).last_hidden_state[0].numpy()


def hf_class_logits(path: str, prompt: list[int]) -> np.ndarray:
    """f32 `[labels]`."""
    import torch

    with torch.no_grad():
        return _model(path, "ModelForSequenceClassification")(torch.tensor([prompt])).logits[0].numpy()
