"""Which architectures there are. A new model is a file beside this one and a line in `MODELS`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vjax.errors import ModelLoadError
from vjax.models.arch import ArchConfig
from vjax.models.hf_config import read_hf_config

if TYPE_CHECKING:
    from vjax.models.decoder import DecoderModel

__all__ = ["MODELS", "arch_config_from_hf", "get_model_class", "read_hf_config", "supported_architectures"]

#: Hugging Face architecture -> module, which holds a class of that name. Imported when first asked for.
MODELS: dict[str, str] = {
    "LlamaForCausalLM": "vjax.models.llama",
    "MistralForCausalLM": "vjax.models.mistral",
    "Qwen2ForCausalLM": "vjax.models.qwen2",
    "Qwen3ForCausalLM": "vjax.models.qwen3",
}


def supported_architectures() -> list[str]:
    """Hugging Face class names, as config.json spells them."""
    return list(MODELS)


def arch_config_from_hf(config: dict[str, Any]) -> ArchConfig:
    """The architecture record of a parsed config.json.

    Raises:
        ModelLoadError: Names the architecture, activation, rope type, quantisation or other field that is not
            supported, or the one that is missing.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise ModelLoadError(
            f"config.json: architectures is {architectures!r}; a list of one of {', '.join(MODELS)} is needed.",
            parameter="architectures",
            value=architectures,
        )
    return _model_class(architectures[0]).arch_config(config)


def get_model_class(arch: ArchConfig) -> type[DecoderModel]:
    """The decoder class of an architecture.

    Raises:
        ModelLoadError: The architecture is not supported.
    """
    return _model_class(arch.architecture)


def _model_class(architecture: str) -> type[DecoderModel]:
    if architecture not in MODELS:
        raise ModelLoadError(
            f"Architecture {architecture!r} is not supported; supported are {', '.join(MODELS)}.",
            parameter="architectures",
            value=architecture,
        )
    return getattr(importlib.import_module(MODELS[architecture]), architecture)
