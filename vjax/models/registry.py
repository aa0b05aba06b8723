"""Which architectures there are: those of vjax, and those that users register.

A new model of vjax's own is a file beside this one and a line in `MODELS`.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vjax.errors import ModelLoadError
from vjax.log import logger
from vjax.models.arch import ArchConfig
from vjax.models.fields import positive_int
from vjax.models.hf_config import read_hf_config

if TYPE_CHECKING:
    from vjax.models.decoder import DecoderModel

__all__ = [
    "MODELS",
    "POOLING_MODELS",
    "ModelRegistry",
    "arch_config_from_hf",
    "get_model_class",
    "is_registered",
    "own_head",
    "read_hf_config",
    "registered_models",
    "supported_architectures",
]

log = logger(__name__)

#: Hugging Face architecture -> module, which holds a class of that name. Imported when first asked for.
MODELS: dict[str, str] = {
    "LlamaForCausalLM": "vjax.models.llama",
    "MistralForCausalLM": "vjax.models.mistral",
    "Qwen2ForCausalLM": "vjax.models.qwen2",
    "Qwen3ForCausalLM": "vjax.models.qwen3",
}

#: A decoder of `MODELS` under another head -> that decoder, and the head (see `ArchConfig.head`).
POOLING_MODELS: dict[str, tuple[str, str]] = {
    **{
        f"{family}{suffix}": (f"{family}ForCausalLM", head)
        for suffix, head in (("Model", "none"), ("ForSequenceClassification", "score"))
        for family in ("Llama", "Mistral", "Qwen2", "Qwen3")
    },
    "Qwen2ForRewardModel": ("Qwen2ForCausalLM", "score_mlp"),
    "Qwen2ForProcessRewardModel": ("Qwen2ForCausalLM", "score_mlp"),
}

#: Labels that the code of these models fixes, whatever config.json says.
_NUM_LABELS = {"Qwen2ForRewardModel": 1, "Qwen2ForProcessRewardModel": 2}

#: What users registered: a class, or "module:class" until it is first asked for. It counts before `MODELS`.
_registered: dict[str, type[DecoderModel] | str] = {}


class ModelRegistry:
    """Adds architectures from outside the package, as vLLM's class of this name does."""

    @staticmethod
    def register_model(model_arch: str, model_cls: type[DecoderModel] | str) -> None:
        """Has `model_cls` serve the checkpoints whose config.json names `model_arch`, in this process, from now on.

        Args:
            model_arch: One that vjax has may be given: it is replaced.
            model_cls: A subclass of `vjax.models.decoder.DecoderModel`, or "module:class", imported when first needed.

        Raises:
            TypeError: `model_arch` is no string, or `model_cls` neither such a class nor a string.
            ValueError: The string is not of that form.
        """
        if not isinstance(model_arch, str):
            raise TypeError(f"model_arch is {model_arch!r}; the name of an architecture is needed.")
        if not isinstance(model_cls, str):
            _check_class(model_cls)
        elif not all(part.strip() for part in model_cls.partition(":")) or model_cls.count(":") != 1:
            raise ValueError(f"model_cls is {model_cls!r}; a class, or a string 'module:class', is needed.")
        if model_arch in supported_architectures():
            log.warning("architecture %s was there already; from now on %s serves it", model_arch, model_cls)
        _registered[model_arch] = model_cls

    @staticmethod
    def get_supported_archs() -> set[str]:
        """Hugging Face class names that a config.json may name."""
        return set(supported_architectures())


def supported_architectures() -> list[str]:
    """Hugging Face class names, as config.json spells them."""
    return list(MODELS | POOLING_MODELS | _registered)


def is_registered(architecture: str) -> bool:
    """Whether its class comes from outside vjax."""
    return architecture in _registered


def registered_models() -> dict[str, str]:
    """What users registered, for another process: architecture -> "module:class". Classes that only this process can
    find, such as those of its main program, are left out."""
    named = {
        name: model if isinstance(model, str) else f"{model.__module__}:{model.__qualname__}"
        for name, model in _registered.items()
    }
    return {name: where for name, where in named.items() if not where.startswith("__main__:") and "<" not in where}


def own_head(architecture: str) -> str:
    """The head that the architecture's name stands for; see `ArchConfig.head`."""
    if architecture in POOLING_MODELS and architecture not in _registered:
        return POOLING_MODELS[architecture][1]
    return "score" if architecture.endswith("ForSequenceClassification") else "lm"


def arch_config_from_hf(config: dict[str, Any], head: str | None = None) -> ArchConfig:
    """The architecture record of a parsed config.json.

    Args:
        head: In place of the architecture's own; see `ArchConfig.head`.

    Raises:
        ModelLoadError: Names the architecture, activation, rope type, quantisation or other field that is not
            supported, or the one that is missing.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        supported = ", ".join(supported_architectures())
        raise ModelLoadError(
            f"config.json: architectures is {architectures!r}; a list of one of {supported} is needed.",
            parameter="architectures",
            value=architectures,
        )
    arch = _model_class(architectures[0]).arch_config(config)
    head = head or own_head(architectures[0])
    if head == "lm":
        return arch
    if config.get("is_causal") is False:
        raise ModelLoadError(
            "config.json: is_causal is false, and attention in both directions is not supported; use a model whose "
            "tokens attend to those before them.",
            parameter="is_causal",
            value=False,
        )
    num_labels = 0 if head == "none" else _num_labels(config)
    return replace(arch, head=head, num_labels=num_labels, tie_word_embeddings=False)


def _num_labels(config: dict[str, Any]) -> int:
    """As transformers counts them."""
    if (fixed := _NUM_LABELS.get(config["architectures"][0])) is not None:
        return fixed
    labels = config.get("id2label")
    return len(labels) if isinstance(labels, dict) and labels else positive_int(config, "num_labels", 2)


def get_model_class(arch: ArchConfig) -> type[DecoderModel]:
    """The decoder class of an architecture.

    Raises:
        ModelLoadError: The architecture is not supported.
    """
    return _model_class(arch.architecture)


def _model_class(architecture: str) -> type[DecoderModel]:
    if architecture in _registered:
        return _registered_class(architecture)
    architecture = POOLING_MODELS.get(architecture, (architecture, ""))[0]
    if architecture not in MODELS:
        raise ModelLoadError(
            f"Architecture {architecture!r} is not supported; supported are {', '.join(supported_architectures())}. "
            "vjax.ModelRegistry.register_model adds one.",
            parameter="architectures",
            value=architecture,
        )
    return getattr(importlib.import_module(MODELS[architecture]), architecture)


def _registered_class(architecture: str) -> type[DecoderModel]:
    model = _registered[architecture]
    if isinstance(model, str):
        module, _, name = model.partition(":")
        try:
            model = getattr(importlib.import_module(module), name)
            _check_class(model)
        except (ImportError, AttributeError, TypeError) as e:
            raise ModelLoadError(
                f"Architecture {architecture!r} was registered as {model!r}, which cannot be used: {e}",
                parameter="architectures",
                value=architecture,
            ) from e
        _registered[architecture] = model
    return model


def _check_class(model: Any) -> None:
    """Raises: TypeError unless it is a class that an engine can run."""
    from vjax.models.decoder import DecoderModel

    if not (isinstance(model, type) and issubclass(model, DecoderModel)):
        raise TypeError(f"{model!r} is no subclass of vjax.models.decoder.DecoderModel.")
