"""The engine's exceptions under the import path that vLLM users know."""

from __future__ import annotations

from vjax.errors import EngineDeadError

__all__ = ["EngineDeadError"]
