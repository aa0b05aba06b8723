"""Engine metrics under vLLM's names with the prefix "vjax:", and the throughput line in the log."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vjax.log import logger
from vjax.messages import EngineOutput
from vjax.outputs import FINISH_REASONS

#: Seconds of work between two throughput lines.
LOG_INTERVAL = 5.0
#: Upper bounds of the buckets of tokens per step.
_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

_log = logger("metrics")


@dataclass(kw_only=True)
class Metric:
    """One time series; `labels` tells series of the same name apart."""

    name: str
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class Counter(Metric):
    """Only grows."""

    value: int


@dataclass(kw_only=True)
class Gauge(Metric):
    """The value of the moment."""

    value: float


@dataclass(kw_only=True)
class Histogram(Metric):
    """`buckets`: upper bound ("+Inf" is the last) -> number of observations up to it."""

    count: int
    sum: float
    buckets: dict[str, int]


class SchedulerNumbers(Protocol):
    """What the scheduler's statistics offer: gauges, then counters since the start of the engine."""

    num_running: int
    num_waiting: int
    #: In [0, 1].
    kv_cache_usage: float
    #: In tokens, as the hits.
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int


class EngineMetrics:
    """Collects what a step did; `snapshot` is what `LLM.get_metrics` returns."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._num_finished: dict[str, int] = dict.fromkeys(FINISH_REASONS, 0)
        self._iteration_tokens = _TokenHistogram()
        self._num_tokens = 0
        self._throughput = ThroughputLogger(clock)

    def record(self, stats: SchedulerNumbers, outputs: Sequence[EngineOutput]) -> None:
        """Takes the numbers after a step. `outputs`: the step's, after the output processor has seen them."""
        for output in outputs:
            if output.finish_reason is not None:
                self._num_finished[output.finish_reason] += 1
        num_tokens = stats.prompt_tokens + stats.generation_tokens
        if num_tokens > self._num_tokens:
            self._iteration_tokens.observe(num_tokens - self._num_tokens)
            self._num_tokens = num_tokens
        self._throughput.record(stats)

    def record_aborts(self, count: int) -> None:
        """Requests that ended without an output of the engine."""
        self._num_finished["abort"] += count

    def snapshot(self, stats: SchedulerNumbers) -> list[Metric]:
        """All series, with the scheduler's numbers of now."""
        gauges = {
            "num_requests_running": stats.num_running,
            "num_requests_waiting": stats.num_waiting,
            "kv_cache_usage_perc": stats.kv_cache_usage,
        }
        counters = (
            "prefix_cache_queries",
            "prefix_cache_hits",
            "num_preemptions",
            "prompt_tokens",
            "generation_tokens",
        )
        return [
            *(Gauge(name=f"vjax:{name}", value=float(value)) for name, value in gauges.items()),
            *(Counter(name=f"vjax:{name}", value=getattr(stats, name)) for name in counters),
            *(
                Counter(name="vjax:request_success", labels={"finished_reason": reason}, value=value)
                for reason, value in self._num_finished.items()
            ),
            self._iteration_tokens.read("vjax:iteration_tokens_total"),
        ]


class ThroughputLogger:
    """Writes a line of averages after every `LOG_INTERVAL` seconds of work. Time without steps is left out: a pause
    longer than the interval starts a new period."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._last_time: float | None = None
        self._start_time = 0.0
        self._start_prompt_tokens = 0
        self._start_generation_tokens = 0

    def record(self, stats: SchedulerNumbers) -> None:
        """To be called after every step."""
        now = self._clock()
        last, self._last_time = self._last_time, now
        if last is None or now - last > LOG_INTERVAL:
            self._restart(now, stats)
        elif now - self._start_time >= LOG_INTERVAL:
            self._write(now - self._start_time, stats)
            self._restart(now, stats)

    def _restart(self, now: float, stats: SchedulerNumbers) -> None:
        self._start_time = now
        self._start_prompt_tokens = stats.prompt_tokens
        self._start_generation_tokens = stats.generation_tokens

    def _write(self, seconds: float, stats: SchedulerNumbers) -> None:
        queries = stats.prefix_cache_queries
        _log.info(
            "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, Running: %d reqs, "
            "Waiting: %d reqs, KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%",
            (stats.prompt_tokens - self._start_prompt_tokens) / seconds,
            (stats.generation_tokens - self._start_generation_tokens) / seconds,
            stats.num_running,
            stats.num_waiting,
            100 * stats.kv_cache_usage,
            100 * stats.prefix_cache_hits / queries if queries else 0.0,
        )


class _TokenHistogram:
    def __init__(self) -> None:
        self._counts = [0] * (len(_TOKEN_BUCKETS) + 1)
        self._sum = 0

    def observe(self, value: int) -> None:
        self._counts[bisect.bisect_left(_TOKEN_BUCKETS, value)] += 1
        self._sum += value

    def read(self, name: str) -> Histogram:
        buckets: dict[str, int] = {}
        total = 0
        for bound, count in zip((*map(str, _TOKEN_BUCKETS), "+Inf"), self._counts, strict=True):
            total += count
            buckets[bound] = total
        return Histogram(name=name, count=total, sum=float(self._sum), buckets=buckets)
