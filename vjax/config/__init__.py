"""Engine arguments, their resolution into an immutable configuration, and run files. Never imports jax."""

from __future__ import annotations

from vjax.config.cache import CacheConfig
from vjax.config.engine_args import EngineArgs
from vjax.config.engine_config import EngineConfig, LoadConfig, ModelConfig
from vjax.config.pooler import PoolerConfig
from vjax.config.scheduler import SchedulerConfig

__all__ = ["CacheConfig", "EngineArgs", "EngineConfig", "LoadConfig", "ModelConfig", "PoolerConfig", "SchedulerConfig"]
