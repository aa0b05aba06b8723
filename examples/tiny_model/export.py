"""The trained model as a Hugging Face directory: config, bf16 weights, generation defaults and a model card."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.flax import save_file

from .model import TinyConfig, TinyLlama
from .tokenizer import END_OF_TEXT_ID, END_OF_TURN_ID

_PROJECTIONS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
_NORMS = ("input_layernorm", "post_attention_layernorm")


def round_parameters(model: TinyLlama) -> None:
    """Rounds every parameter to bf16 in place (they stay fp32), so that what is measured is what is exported."""
    state = nnx.state(model)
    nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), state))


def checkpoint_tensors(model: TinyLlama) -> dict[str, jax.Array]:
    """Hugging Face's names and layouts ([out, in] for projections) with bf16 values; the head is tied and left out."""
    tensors = {
        "model.embed_tokens.weight": model.embed_tokens.embedding[...],
        "model.norm.weight": _scale(model.norm),
    }
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}"
        for block, names in _PROJECTIONS.items():
            for name in names:
                kernel = getattr(getattr(layer, block), name).kernel[...]
                tensors[f"{prefix}.{block}.{name}.weight"] = kernel.T
        for name in _NORMS:
            tensors[f"{prefix}.{name}.weight"] = _scale(getattr(layer, name))
    return {name: jnp.asarray(np.ascontiguousarray(tensor), jnp.bfloat16) for name, tensor in tensors.items()}


def _scale(norm: nnx.RMSNorm) -> jax.Array:
    assert norm.scale is not None
    return norm.scale[...]


def hf_config(config: TinyConfig) -> dict[str, object]:
    """The content of `config.json`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TEXT_ID,
        "torch_dtype": "bfloat16",
    }


GENERATION_CONFIG = {
    "bos_token_id": END_OF_TEXT_ID,
    "eos_token_id": [END_OF_TEXT_ID, END_OF_TURN_ID],
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.95,
}


def write_model(model: TinyLlama, data_folder: Path, out: Path, card: str) -> None:
    """Writes the six files of the model; the tokenizer's two are copied from the prepared data."""
    out.mkdir(parents=True, exist_ok=True)
    weights = out / "model.safetensors"
    save_file(checkpoint_tensors(model), str(weights), metadata={"format": "pt"})
    weights.chmod(0o644)  # the writer leaves it readable for its owner only
    _write_json(out / "config.json", hf_config(model.config))
    _write_json(out / "generation_config.json", GENERATION_CONFIG)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((data_folder / name).read_bytes())
    (out / "README.md").write_text(card, encoding="utf-8")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def model_card(config: TinyConfig, facts: dict, run: dict, scores: dict) -> str:
    """The model card, every figure taken from this run.

    Args:
        config: The model's shape.
        facts: Of the corpus, from `prepare`.
        run: The settings and report of the training.
        scores: Of the evaluation.
    """
    tokens_seen = run["best_step"] * run["batch_size"] * run["window"]
    figures = {
        "parameters": f"{scores['parameters']:,}",
        "epochs": f"{tokens_seen / facts['train_tokens']:.1f}",
        "tokens_seen": f"{tokens_seen:,}",
        "bits": f"{scores['held_out_bits_per_byte']:.3f}",
        "share": f"{100 * scores['valid_completions'] / max(scores['completions'], 1):.1f}",
        **{name: f"{value:,}" if isinstance(value, int) else value for name, value in facts.items()},
    }
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    return template.format(**{**config.__dict__, **run, **scores, **figures})
