"""Reads rope parameters from config.json, in the spelling of transformers 4 and of transformers 5. No jax."""

from __future__ import annotations

from typing import Any

from vjax.errors import ModelLoadError
from vjax.models.arch import RopeConfig
from vjax.models.fields import positive_int, positive_number

DEFAULT_THETA = 10000.0

#: rope type -> (required keys, optional keys), beside the type and rope_theta.
ROPE_KEYS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset({"original_max_position_embeddings"})),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
        frozenset({"original_max_position_embeddings"}),
    ),
    "yarn": (
        frozenset({"factor"}),
        frozenset(
            {
                "original_max_position_embeddings",
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "truncate",
            }
        ),
    ),
}

#: Keys that say how a checkpoint was made and change nothing in the arithmetic.
INERT_KEYS = frozenset({"finetuned"})


def rope_config_from_hf(config: dict[str, Any]) -> RopeConfig:
    """The rope of a model.

    Args:
        config: The parsed config.json: `rope_theta` and `rope_scaling` (transformers 4; `type` or `rope_type`), or
            `rope_parameters` with `rope_theta` inside (transformers 5), which may be nested by layer type.

    Raises:
        ModelLoadError: The rope type is not supported, a key is unknown, missing or no number, or layer types differ.
    """
    parameters = _flat_parameters(config)
    rope_type = _rope_type(parameters)
    theta = positive_number(
        {"rope_theta": parameters.pop("rope_theta", config.get("rope_theta"))}, "rope_theta", DEFAULT_THETA
    )
    _refuse_partial_rotary(config, parameters)
    _check_keys(rope_type, parameters)
    fields = {key: value for key, value in parameters.items() if key not in INERT_KEYS}
    for key in fields.keys() - {"truncate"}:
        positive_number(fields, key)
    if rope_type in ("llama3", "yarn"):
        outside = config.get("original_max_position_embeddings")
        fallback = fields.get("original_max_position_embeddings") or positive_int(config, "max_position_embeddings")
        fields["original_max_position_embeddings"] = int(outside or fallback)
    elif rope_type == "dynamic":
        fields.pop("original_max_position_embeddings", None)
    if rope_type == "llama3" and fields["high_freq_factor"] <= fields["low_freq_factor"]:
        raise ModelLoadError(
            f"config.json: rope type llama3 needs high_freq_factor > low_freq_factor, got "
            f"{fields['high_freq_factor']} and {fields['low_freq_factor']}."
        )
    return RopeConfig(rope_type=rope_type, theta=theta, **fields)


def _flat_parameters(config: dict[str, Any]) -> dict[str, Any]:
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise ModelLoadError(f"config.json: the rope parameters are {parameters!r}; an object is needed.")
    if parameters and all(isinstance(value, dict) for value in parameters.values()):
        variants = list(parameters.values())
        if any(variant != variants[0] for variant in variants):
            raise ModelLoadError(
                f"config.json: rope_parameters differ between the layer types {sorted(parameters)}; "
                "only one rope for all layers is supported."
            )
        parameters = variants[0]
    return {key: value for key, value in parameters.items() if value is not None}


def _rope_type(parameters: dict[str, Any]) -> str:
    old, new = parameters.pop("type", None), parameters.pop("rope_type", None)
    if old is not None and new is not None and old != new:
        raise ModelLoadError(f"config.json: rope `type` is {old!r} but `rope_type` is {new!r}; they must agree.")
    rope_type = new or old or "default"
    if rope_type not in ROPE_KEYS:
        raise ModelLoadError(
            f"config.json: rope type {rope_type!r} is not supported; supported are {', '.join(ROPE_KEYS)}."
        )
    return rope_type


def _refuse_partial_rotary(config: dict[str, Any], parameters: dict[str, Any]) -> None:
    for value in (parameters.pop("partial_rotary_factor", None), config.get("partial_rotary_factor")):
        if value is not None and value != 1:
            raise ModelLoadError(
                f"config.json: partial_rotary_factor {value!r} is not supported; only 1 (the whole head) is."
            )


def _check_keys(rope_type: str, parameters: dict[str, Any]) -> None:
    required, optional = ROPE_KEYS[rope_type]
    missing = sorted(required - parameters.keys())
    unknown = sorted(parameters.keys() - required - optional - INERT_KEYS)
    if missing:
        raise ModelLoadError(f"config.json: rope type {rope_type!r} needs the keys {', '.join(missing)}.")
    if unknown:
        raise ModelLoadError(
            f"config.json: rope type {rope_type!r} does not know the keys {', '.join(unknown)}; "
            f"it knows {', '.join(sorted(required | optional)) or 'none beside rope_theta'}."
        )
