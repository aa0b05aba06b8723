"""`AsyncLLM` under the import path that vLLM users know."""

from __future__ import annotations

from vjax.engine.async_llm import AsyncLLM

__all__ = ["AsyncLLM"]
