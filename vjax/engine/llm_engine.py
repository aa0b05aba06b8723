"""V0: static batches, no prefix caching and whole-prompt prefill unless asked for.

`LLMEngine` of this module is the class of the active mode, so `LLMEngine.__module__` tells which one that is.
"""

from __future__ import annotations

from typing import Any

from vjax import envs
from vjax.engine.front import BaseLLMEngine


class V0LLMEngine(BaseLLMEngine):
    """The engine in V0 mode."""

    use_v1 = False


def __getattr__(name: str) -> Any:
    if name != "LLMEngine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if envs.use_v1():
        from vjax.v1.engine.llm_engine import LLMEngine

        return LLMEngine
    return V0LLMEngine
