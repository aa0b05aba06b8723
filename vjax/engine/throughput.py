"""The throughput line in the log."""

from __future__ import annotations

from collections import deque

from vjax.log import logger
from vjax.scheduler.stats import SchedulerStats

#: Seconds of work between two lines.
LOG_INTERVAL = 5.0
#: The hit rate is that of so many latest requests.
HIT_RATE_REQUESTS = 1000

_log = logger("metrics")


class ThroughputLogger:
    """Writes a line of averages after every `LOG_INTERVAL` seconds of work. Time without steps is left out: a pause
    longer than the interval starts a new period."""

    def __init__(self) -> None:
        self._last_time: float | None = None
        self._start_time = 0.0
        self._start_prompt_tokens = 0
        self._start_generation_tokens = 0
        self._hit_rate = _RecentHitRate()

    def record(self, stats: SchedulerStats, now: float) -> None:
        """To be called after every step. `now`: monotonic seconds."""
        self._hit_rate.record(stats)
        last, self._last_time = self._last_time, now
        if last is None or now - last > LOG_INTERVAL:
            self._restart(now, stats)
        elif now - self._start_time >= LOG_INTERVAL:
            self._write(now - self._start_time, stats)
            self._restart(now, stats)

    def _restart(self, now: float, stats: SchedulerStats) -> None:
        self._start_time = now
        self._start_prompt_tokens = stats.prompt_tokens
        self._start_generation_tokens = stats.generation_tokens

    def _write(self, seconds: float, stats: SchedulerStats) -> None:
        numbers = {
            "prompt_tokens_per_second": (stats.prompt_tokens - self._start_prompt_tokens) / seconds,
            "generation_tokens_per_second": (stats.generation_tokens - self._start_generation_tokens) / seconds,
            "num_requests_running": stats.num_running,
            "num_requests_waiting": stats.num_waiting,
            "kv_cache_usage_percent": 100 * stats.kv_cache_usage,
            "prefix_cache_hit_rate_percent": 100 * self._hit_rate.value,
        }
        _log.info(
            "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, Running: %d reqs, "
            "Waiting: %d reqs, KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%",
            *numbers.values(),
            extra={"fields": numbers},
        )


class _RecentHitRate:
    """Share of cached tokens in the prompts of the latest `HIT_RATE_REQUESTS` requests, a step's at a time."""

    def __init__(self) -> None:
        self._seen = self._oldest = (0, 0, 0)
        #: (requests, queries, hits) since the start, after each step that admitted somebody.
        self._marks: deque[tuple[int, int, int]] = deque()

    def record(self, stats: SchedulerStats) -> None:
        requests = stats.prefix_cache_requests
        if requests == self._seen[0]:
            return
        self._seen = (requests, stats.prefix_cache_queries, stats.prefix_cache_hits)
        self._marks.append(self._seen)
        while len(self._marks) > 1 and requests - self._oldest[0] > HIT_RATE_REQUESTS:
            self._oldest = self._marks.popleft()

    @property
    def value(self) -> float:
        queries = self._seen[1] - self._oldest[1]
        return (self._seen[2] - self._oldest[2]) / queries if queries else 0.0
