"""vjax: LLM inference in JAX for NVIDIA GPUs, with vLLM's API.

Importing this package does not import jax; the names below are loaded when they are first used. `LLM` is bound to the
mode (V0 or V1) that the environment names at that moment.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vjax.beam_search import BeamSearchOutput, BeamSearchSequence
    from vjax.config.engine_args import AsyncEngineArgs, EngineArgs
    from vjax.config.pooler import PoolerConfig
    from vjax.engine.async_llm import AsyncLLM, AsyncLLMEngine
    from vjax.errors import (
        ConfigError,
        EngineDeadError,
        EngineStepError,
        ModelLoadError,
        OutOfMemoryError,
        VjaxValidationError,
    )
    from vjax.llm import LLM
    from vjax.logits_processor import LogitsProcessor
    from vjax.logprobs import FlatLogprobs, Logprob
    from vjax.models.registry import ModelRegistry
    from vjax.outputs import (
        ClassificationRequestOutput,
        CompletionOutput,
        EmbeddingRequestOutput,
        PoolingRequestOutput,
        RequestOutput,
        ScoringRequestOutput,
    )
    from vjax.parsers.registry import reasoning_parser, tool_parser
    from vjax.pooling_params import PoolingParams
    from vjax.sampling_params import BeamSearchParams, RepetitionDetectionParams, RequestOutputKind, SamplingParams
    from vjax.structured_outputs import StructuredOutputsParams

__version__ = "0.1.0"

_MODULES = {
    "AsyncEngineArgs": "vjax.config.engine_args",
    "AsyncLLM": "vjax.engine.async_llm",
    "AsyncLLMEngine": "vjax.engine.async_llm",
    "BeamSearchOutput": "vjax.beam_search",
    "BeamSearchParams": "vjax.sampling_params",
    "BeamSearchSequence": "vjax.beam_search",
    "ClassificationRequestOutput": "vjax.outputs",
    "CompletionOutput": "vjax.outputs",
    "ConfigError": "vjax.errors",
    "EmbeddingRequestOutput": "vjax.outputs",
    "EngineArgs": "vjax.config.engine_args",
    "EngineDeadError": "vjax.errors",
    "EngineStepError": "vjax.errors",
    "LogitsProcessor": "vjax.logits_processor",
    "FlatLogprobs": "vjax.logprobs",
    "Logprob": "vjax.logprobs",
    "ModelLoadError": "vjax.errors",
    "ModelRegistry": "vjax.models.registry",
    "OutOfMemoryError": "vjax.errors",
    "PoolerConfig": "vjax.config.pooler",
    "PoolingParams": "vjax.pooling_params",
    "PoolingRequestOutput": "vjax.outputs",
    "RepetitionDetectionParams": "vjax.sampling_params",
    "RequestOutput": "vjax.outputs",
    "RequestOutputKind": "vjax.sampling_params",
    "SamplingParams": "vjax.sampling_params",
    "ScoringRequestOutput": "vjax.outputs",
    "StructuredOutputsParams": "vjax.structured_outputs",
    "VjaxValidationError": "vjax.errors",
    "reasoning_parser": "vjax.parsers.registry",
    "tool_parser": "vjax.parsers.registry",
}

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "AsyncLLMEngine",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "ConfigError",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "EngineDeadError",
    "EngineStepError",
    "FlatLogprobs",
    "LogitsProcessor",
    "Logprob",
    "ModelLoadError",
    "ModelRegistry",
    "OutOfMemoryError",
    "PoolerConfig",
    "PoolingParams",
    "PoolingRequestOutput",
    "RepetitionDetectionParams",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "VjaxValidationError",
    "__version__",
    "reasoning_parser",
    "tool_parser",
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
