"""Reads the fields of config.json that the supported decoders share. No jax."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vjax.errors import ModelLoadError
from vjax.models.arch import ArchConfig
from vjax.models.fields import positive_int, positive_number
from vjax.models.rope_config import rope_config_from_hf

SUPPORTED_ACTIVATIONS = ("silu", "swish")

#: Keys under which config.json announces quantised weights.
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")


def read_hf_config(model_dir: str | Path) -> dict[str, Any]:
    """The parsed config.json of a model directory.

    Raises:
        ModelLoadError: There is no such file, or it is no JSON object.
    """
    path = Path(model_dir) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"{path} does not exist; a Hugging Face model directory is needed.") from None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelLoadError(f"{path} holds a {type(config).__name__}; a JSON object is needed.")
    return config


def decoder_arch(
    config: dict[str, Any],
    *,
    sliding_windows: tuple[int | None, ...] | None = None,
    default_num_kv_heads: int | None = None,
    default_head_dim: int | None = None,
    **features: Any,
) -> ArchConfig:
    """The architecture of a Llama-like decoder.

    Args:
        config: The parsed config.json.
        sliding_windows: Per layer; None is full attention in all of them.
        default_num_kv_heads: Used when config.json has no `num_key_value_heads`; None stands for the number of heads.
        default_head_dim: Used when config.json has no `head_dim`; None stands for hidden_size // num_attention_heads.
        features: The flags qkv_bias, o_bias, mlp_bias and qk_norm.

    Raises:
        ModelLoadError: A field is missing, out of its domain, or asks for something that is not supported.
    """
    _refuse_unsupported(config)
    num_layers = positive_int(config, "num_hidden_layers")
    hidden_size = positive_int(config, "hidden_size")
    num_heads = positive_int(config, "num_attention_heads")
    num_kv_heads = positive_int(config, "num_key_value_heads", default_num_kv_heads or num_heads)
    head_dim = positive_int(config, "head_dim", default_head_dim or hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise ModelLoadError(
            f"config.json: num_attention_heads ({num_heads}) must be a multiple of "
            f"num_key_value_heads ({num_kv_heads})."
        )
    if head_dim % 2:
        raise ModelLoadError(f"config.json: head_dim is {head_dim}; rope needs an even one.")
    max_position_embeddings = positive_int(config, "max_position_embeddings")
    return ArchConfig(
        architecture=config["architectures"][0],
        model_type=str(config.get("model_type", "")),
        vocab_size=positive_int(config, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=positive_int(config, "intermediate_size"),
        rms_norm_eps=positive_number(config, "rms_norm_eps", 1e-6),
        rope=rope_config_from_hf(config),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=max_position_embeddings,
        sliding_windows=sliding_windows or (None,) * num_layers,
        torch_dtype=_dtype_name(config),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=_token_ids(config.get("eos_token_id")),
        **features,
    )


def layer_windows(config: dict[str, Any]) -> tuple[int | None, ...]:
    """Sliding windows as Qwen writes them: `use_sliding_window`, `sliding_window`, and which layers have it, from
    `layer_types` or else all layers from `max_window_layers` on.

    Raises:
        ModelLoadError: A layer type is unknown, the list has the wrong length, or a windowed layer has no window.
    """
    num_layers = positive_int(config, "num_hidden_layers")
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    layer_types = config.get("layer_types")
    if layer_types is None:
        if window is None:
            return (None,) * num_layers
        first = config.get("max_window_layers", 28)
        if not isinstance(first, int):
            raise ModelLoadError(f"config.json: max_window_layers is {first!r}; an integer is needed.")
        layer_types = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    unknown = sorted(set(layer_types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ModelLoadError(
            f"config.json: layer_types {', '.join(unknown)} are not supported; "
            "supported are full_attention and sliding_attention."
        )
    if len(layer_types) != num_layers:
        raise ModelLoadError(f"config.json: layer_types has {len(layer_types)} entries for {num_layers} layers.")
    if "sliding_attention" in layer_types:
        if window is None:
            raise ModelLoadError(
                "config.json: layer_types names sliding_attention, but sliding_window is not set (or "
                "use_sliding_window is false)."
            )
        window = positive_int(config, "sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def refuse_set(config: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Raises ModelLoadError for a key that is set to anything but null, false or zero, where the architecture has no
    such feature."""
    for key in keys:
        if config.get(key):
            raise ModelLoadError(
                f"config.json: {key} is {config[key]!r}, which {config['architectures'][0]} does not support here; "
                "remove it, or convert the checkpoint to an architecture that has it.",
                parameter=key,
                value=config[key],
            )


def _refuse_unsupported(config: dict[str, Any]) -> None:
    for key in QUANTIZATION_KEYS:
        quantization = config.get(key)
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise ModelLoadError(
                f"config.json: {key} (quant_method {method!r}) is not supported; use the unquantised checkpoint.",
                parameter=key,
                value=quantization,
            )
    activation = config.get("hidden_act", "silu")
    if activation not in SUPPORTED_ACTIVATIONS:
        raise ModelLoadError(
            f"config.json: hidden_act {activation!r} is not supported; supported is {SUPPORTED_ACTIVATIONS[0]}.",
            parameter="hidden_act",
            value=activation,
        )


def _dtype_name(config: dict[str, Any]) -> str | None:
    name = config.get("torch_dtype") or config.get("dtype")
    return str(name).removeprefix("torch.") if name else None


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ModelLoadError(
            f"config.json: eos_token_id is {value!r}; a token id or a list of token ids is needed.",
            parameter="eos_token_id",
            value=value,
        )
    return tuple(ids)
