"""V1: continuous batching, chunked prefill, prefix caching, asynchronous scheduling."""

from __future__ import annotations

from vjax.engine.front import BaseLLMEngine


class LLMEngine(BaseLLMEngine):
    """The engine in V1 mode."""

    use_v1 = True
