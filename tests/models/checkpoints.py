"""Tiny random Hugging Face checkpoints, one per architecture feature, and transformers' own answers for them.

The engine's tests use these too: `make_checkpoint(name, directory)` writes one, `hf_greedy(path, ids, n)` decodes with
transformers (torch, CPU, float32, eager attention), `hf_logits(path, ids)` gives the logits of a prompt.
"""

from __future__ import annotations

import functools
import zlib
from pathlib import Path
from typing import Any

VOCAB_SIZE = 160

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    # Larger than transformers' 0.02, so that heads attend unevenly and logits are far apart.
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def _rope(rope_type: str, theta: float = 10000.0, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **fields}}


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

#: name -> (transformers model type, what differs from the base).
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa": ("llama", _rope("default", 500000.0)),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", _rope("linear", factor=2.0)),
    "llama-dynamic": ("llama", _rope("dynamic", factor=4.0)),
    "llama-llama3": ("llama", _rope("llama3", 500000.0, **_LLAMA3)),
    "llama-yarn": ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "llama-yarn-mscale": (
        "llama",
        _rope("yarn", factor=8.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=1.0, beta_fast=16.0),
    ),
    "llama-head64": ("llama", {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "llama-head80": ("llama", {"head_dim": 80, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "llama-head96": ("llama", {"head_dim": 96, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "llama-head128": ("llama", {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 2}),
    "llama-head256": ("llama", {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 24, "num_hidden_layers": 3}),
    "qwen2": ("qwen2", _rope("default", 1000000.0)),
    "qwen2-tied-window": (
        "qwen2",
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 20,
            "max_window_layers": 1,
            "num_hidden_layers": 3,
        },
    ),
    "qwen2-yarn": ("qwen2", _rope("yarn", 1000000.0, factor=4.0, original_max_position_embeddings=128)),
    "qwen3": ("qwen3", _rope("default", 1000000.0)),
    "qwen3-tied-biases": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 32}),
}


def make_checkpoint(name: str, directory: str | Path, *, max_shard_size: str = "1GB") -> str:
    """Writes the checkpoint `name` below `directory` unless it is there, and returns its path.

    Weights are random with a seed of the name, in float32; norms and biases are random too, so that none can be left
    out unnoticed.
    """
    path = Path(directory) / name
    if (path / "config.json").exists():
        return str(path)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model_type, fields = CHECKPOINTS[name]
    config = AutoConfig.for_model(model_type, **{**_BASE, **fields})
    torch.manual_seed(zlib.crc32(name.encode()))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return str(path)


@functools.lru_cache(maxsize=4)
def _hf_model(path: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def hf_logits(path: str, prompt_ids: list[int]) -> Any:
    """Logits f32 `[len(prompt_ids), vocab]` (numpy) of a prompt."""
    import torch

    with torch.no_grad():
        return _hf_model(path)(torch.tensor([prompt_ids])).logits[0].numpy()


def hf_greedy(path: str, prompt_ids: list[int], n: int) -> list[int]:
    """The n ids that greedy decoding appends to the prompt; an end of sequence does not stop it."""
    import torch
    from transformers import DynamicCache

    model, ids = _hf_model(path), torch.tensor([prompt_ids])
    cache = DynamicCache(config=model.config)
    generated: list[int] = []
    with torch.no_grad():
        for _ in range(n):
            # The cache's name depends on transformers' version, its place does not: after mask and positions.
            output = model(ids, None, None, cache, use_cache=True)
            generated.append(int(output.logits[0, -1].argmax()))
            ids = torch.tensor([[generated[-1]]])
    return generated


def hf_beam_search(
    path: str, prompt_ids: list[int], width: int, n: int, *, eos_token_id: int | None = None, **options: Any
) -> tuple[list[list[int]], list[float]]:
    """The `width` sequences that beam search appends up to n ids to, with the prompt's ids, and their scores."""
    import torch
    from transformers import GenerationConfig

    model = _hf_model(path)
    config = GenerationConfig(
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=n,
        do_sample=False,
        eos_token_id=eos_token_id,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    prompt, kept = torch.tensor([prompt_ids]), model.generation_config
    model.generation_config = GenerationConfig()  # what `config` leaves open is taken from there
    try:
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    finally:
        model.generation_config = kept
    sequences = []
    for row in found.sequences.tolist():
        output = row[len(prompt_ids) :]
        end = output.index(eos_token_id) + 1 if eos_token_id in output else len(output)  # padding is behind it
        sequences.append([*prompt_ids, *output[:end]])
    return sequences, found.sequences_scores.tolist()
