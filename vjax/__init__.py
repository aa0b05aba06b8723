"""vjax: LLM inference in JAX for NVIDIA GPUs, with vLLM's API.

Importing this package does not import jax; the names below are loaded when they are first used. `LLM` is bound to the
mode (V0 or V1) that the environment names at that moment.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vjax.config.engine_args import EngineArgs
    from vjax.errors import ConfigError, EngineStepError, ModelLoadError, OutOfMemoryError, VjaxValidationError
    from vjax.llm import LLM
    from vjax.models.registry import ModelRegistry
    from vjax.outputs import CompletionOutput, Logprob, RequestOutput
    from vjax.sampling_params import RequestOutputKind, SamplingParams

__version__ = "0.1.0"

_MODULES = {
    "CompletionOutput": "vjax.outputs",
    "ConfigError": "vjax.errors",
    "EngineArgs": "vjax.config.engine_args",
    "EngineStepError": "vjax.errors",
    "Logprob": "vjax.outputs",
    "ModelLoadError": "vjax.errors",
    "ModelRegistry": "vjax.models.registry",
    "OutOfMemoryError": "vjax.errors",
    "RequestOutput": "vjax.outputs",
    "RequestOutputKind": "vjax.sampling_params",
    "SamplingParams": "vjax.sampling_params",
    "VjaxValidationError": "vjax.errors",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "ConfigError",
    "EngineArgs",
    "EngineStepError",
    "Logprob",
    "ModelLoadError",
    "ModelRegistry",
    "OutOfMemoryError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "VjaxValidationError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from vjax import envs, llm

        return llm.V1LLM if envs.use_v1() else llm.V0LLM
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'vjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
