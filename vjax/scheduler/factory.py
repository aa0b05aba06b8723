"""Picks the batching policy that the config asks for."""

from __future__ import annotations

import time
from collections.abc import Callable

from vjax.config.cache import CacheConfig
from vjax.config.scheduler import SchedulerConfig
from vjax.scheduler.batching import ContinuousBatching
from vjax.scheduler.pooling import PoolingScheduler
from vjax.scheduler.scheduler import Scheduler
from vjax.scheduler.static_batch import StaticBatch


def make_scheduler(
    config: SchedulerConfig, cache: CacheConfig, clock: Callable[[], float] = time.monotonic
) -> Scheduler:
    """V0's scheduler for `config.static_batch`, else V1's. `cache.num_gpu_blocks` must be known."""
    kind = PoolingScheduler if config.pools else Scheduler
    return kind(config, cache, StaticBatch() if config.static_batch else ContinuousBatching(), clock)
