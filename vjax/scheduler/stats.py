"""What the scheduler counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class SchedulerStats:
    """Gauges of the moment and counters since the start; names as vLLM's metrics."""

    num_running: int = 0
    num_waiting: int = 0
    #: Fraction of the KV blocks that requests hold, in [0, 1].
    kv_cache_usage: float = 0.0
    #: Counters from here on. Tokens of requests at their first admission, and how many of them the cache had.
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    #: Tokens of prompts whose first output token has arrived.
    prompt_tokens: int = 0
    generation_tokens: int = 0
