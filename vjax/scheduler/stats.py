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
    #: Counters from here on. Requests at their first admission, their tokens, and how many of these the cache had.
    prefix_cache_requests: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    #: Tokens of prompts whose first output token has arrived.
    prompt_tokens: int = 0
    #: Those of them that the prefix cache served.
    prompt_tokens_cached: int = 0
    generation_tokens: int = 0
