"""What an engine records for `LLM.get_metrics` and `RequestOutput.metrics`: vLLM's metrics, with its semantics and
buckets.

A token leaves no object behind: times are kept per completion, in its `RequestMetrics`, and histograms are lists of
counts. Most completions of a step got the token before in one and the same step, so that they have the same inter-token
latency, which is recorded once for all of them.
"""

from __future__ import annotations

import dataclasses
import time
from bisect import bisect_left
from collections import Counter as _count
from collections.abc import Callable, Iterable, Sequence

from vjax.config.cache import CacheConfig
from vjax.engine.input_processor import ProcessedRequest
from vjax.engine.pooling import ProcessedPooling
from vjax.engine.throughput import ThroughputLogger
from vjax.metrics import Counter, Gauge, Histogram, Metric
from vjax.outputs import FINISH_REASONS, RequestMetrics
from vjax.scheduler.stats import SchedulerStats

_ITERATION_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_N = (1, 2, 5, 10, 20)
_PREEMPTIONS = (0, 1, 2, 5, 10, 20)
# fmt: off
_FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)
_TOKEN_SECONDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
_REQUEST_SECONDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)
# fmt: on


class MetricsRecorder:
    """Told what happens to requests; `snapshot` is what `LLM.get_metrics` returns.

    Args:
        max_model_len: The largest bucket of token counts is at most this.
        cache: Shown as labels of cache_config_info.
        clock: Monotonic seconds, the clock of `ProcessedRequest.arrival_time`.
    """

    def __init__(self, max_model_len: int, cache: CacheConfig, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._cache_info = {f.name: str(getattr(cache, f.name)) for f in dataclasses.fields(cache)}
        self._num_finished: dict[str, int] = dict.fromkeys(FINISH_REASONS, 0)
        self._num_tokens = 0
        self._throughput = ThroughputLogger()
        self._now = 0.0

        self._histograms: list[_Counts] = []

        def counts(name: str, bounds: Sequence[float]) -> _Counts:
            self._histograms.append(_Counts(name, bounds))
            return self._histograms[-1]

        lengths = _one_two_five(max_model_len)
        self._first_token = counts("time_to_first_token_seconds", _FIRST_TOKEN_SECONDS)
        self._inter_token = counts("inter_token_latency_seconds", _TOKEN_SECONDS)
        self._per_output_token = counts("request_time_per_output_token_seconds", _TOKEN_SECONDS)
        self._end_to_end = counts("e2e_request_latency_seconds", _REQUEST_SECONDS)
        self._queue = counts("request_queue_time_seconds", _REQUEST_SECONDS)
        self._inference = counts("request_inference_time_seconds", _REQUEST_SECONDS)
        self._prefill = counts("request_prefill_time_seconds", _REQUEST_SECONDS)
        self._decode = counts("request_decode_time_seconds", _REQUEST_SECONDS)
        self._prompt_tokens = counts("request_prompt_tokens", lengths)
        self._generation_tokens = counts("request_generation_tokens", lengths)
        self._prefill_computed = counts("request_prefill_kv_computed_tokens", lengths)
        self._max_generation_tokens = counts("request_max_num_generation_tokens", lengths)
        self._max_tokens = counts("request_params_max_tokens", lengths)
        self._n = counts("request_params_n", _N)
        self._preemptions = counts("request_num_preemptions", _PREEMPTIONS)
        self._iteration_tokens = counts("iteration_tokens_total", _ITERATION_TOKENS)

    # ---- requests -----------------------------------------------------------------------------------------------

    def queue(self, processed: ProcessedRequest | ProcessedPooling) -> None:
        """A prompt is on its way into the engine core: each of its completions gets its record."""
        now = self._clock()
        arrival_time = time.time() - (now - processed.arrival_time)
        for request in processed.requests:
            request.metrics = RequestMetrics(
                arrival_time=arrival_time, arrival_ts=processed.arrival_time, queued_ts=now
            )

    def tick(self) -> float:
        """Reads the clock; what is recorded until the next call happens at that time."""
        self._now = self._clock()
        return self._now

    def first_token(self, metrics: RequestMetrics) -> None:
        """A completion got its first token."""
        metrics.first_token_ts = self._now
        metrics.first_token_latency = self._now - metrics.arrival_ts
        self._first_token.observe(metrics.first_token_latency)

    def tokens(self, previous_times: Iterable[float]) -> None:
        """Completions got further tokens; the ones before came at these times."""
        for time_before, times in _count(previous_times).items():
            self._inter_token.observe(self._now - time_before, times)

    def completion_finished(
        self, metrics: RequestMetrics, processed: ProcessedRequest, num_tokens: int, reason: str
    ) -> None:
        """A completion ended now, with `num_tokens` tokens. Phases that it never reached are not recorded."""
        metrics.finished_ts = self._now
        metrics.num_generation_tokens = num_tokens
        num_prompt_tokens = len(processed.prompt_token_ids)
        self._num_finished[reason] += 1
        self._end_to_end.observe(self._now - metrics.arrival_ts)
        self._prompt_tokens.observe(num_prompt_tokens)
        self._generation_tokens.observe(num_tokens)
        self._max_tokens.observe(processed.params.max_tokens or 0)
        self._preemptions.observe(metrics.num_preemptions)
        if metrics.scheduled_ts:
            self._queue.observe(metrics.scheduled_ts - metrics.queued_ts)
        if metrics.first_token_ts:
            self._prefill.observe(metrics.first_token_ts - metrics.scheduled_ts)
            self._decode.observe(metrics.last_token_ts - metrics.first_token_ts)
            self._inference.observe(metrics.last_token_ts - metrics.scheduled_ts)
            self._per_output_token.observe(metrics.mean_time_per_output_token or 0.0)
            self._prefill_computed.observe(num_prompt_tokens - metrics.num_cached_tokens)

    def prompt_finished(self, num_tokens: Sequence[int]) -> None:
        """All completions of a prompt have ended, with so many tokens each."""
        self._n.observe(len(num_tokens))
        self._max_generation_tokens.observe(max(num_tokens))

    def pooling_finished(self, metrics: RequestMetrics, num_prompt_tokens: int, reason: str) -> None:
        """A prompt was pooled now, or ended otherwise. There are no tokens to be recorded."""
        metrics.finished_ts = self._now
        self._num_finished[reason] += 1
        self._end_to_end.observe(self._now - metrics.arrival_ts)
        self._prompt_tokens.observe(num_prompt_tokens)
        self._preemptions.observe(metrics.num_preemptions)
        if metrics.scheduled_ts:
            self._queue.observe(metrics.scheduled_ts - metrics.queued_ts)
            self._inference.observe(self._now - metrics.scheduled_ts)

    # ---- steps --------------------------------------------------------------------------------------------------

    def record_step(self, stats: SchedulerStats) -> None:
        """Takes the scheduler's numbers after a step's outputs."""
        num_tokens = stats.prompt_tokens + stats.generation_tokens
        if num_tokens > self._num_tokens:
            self._iteration_tokens.observe(num_tokens - self._num_tokens)
            self._num_tokens = num_tokens
        self._throughput.record(stats, self._now)

    def snapshot(self, stats: SchedulerStats) -> list[Metric]:
        """All series, with the scheduler's numbers of now."""
        cached, computed = stats.prompt_tokens_cached, stats.prompt_tokens - stats.prompt_tokens_cached
        return [
            _gauge("num_requests_running", stats.num_running),
            _gauge("num_requests_waiting", stats.num_waiting),
            _gauge("kv_cache_usage_perc", stats.kv_cache_usage),
            _gauge("cache_config_info", 1, **self._cache_info),
            _counter("prefix_cache_queries", stats.prefix_cache_queries),
            _counter("prefix_cache_hits", stats.prefix_cache_hits),
            _counter("num_preemptions", stats.num_preemptions),
            _counter("prompt_tokens", stats.prompt_tokens),
            _counter("prompt_tokens_cached", cached),
            _counter("prompt_tokens_by_source", computed, source="local_compute"),
            _counter("prompt_tokens_by_source", cached, source="local_cache_hit"),
            _counter("generation_tokens", stats.generation_tokens),
            *(_counter("request_success", n, finished_reason=reason) for reason, n in self._num_finished.items()),
            *(counts.read() for counts in self._histograms),
        ]


def merged(records: Sequence[RequestMetrics]) -> RequestMetrics:
    """The record of a prompt from those of its completions, which arrived together; its num_generation_tokens is left
    open."""
    first = records[0]
    finished = [r.finished_ts for r in records]
    return RequestMetrics(
        num_cached_tokens=first.num_cached_tokens,
        num_preemptions=sum(r.num_preemptions for r in records),
        arrival_time=first.arrival_time,
        arrival_ts=first.arrival_ts,
        queued_ts=first.queued_ts,
        scheduled_ts=min((r.scheduled_ts for r in records if r.scheduled_ts), default=0.0),
        first_token_ts=min((r.first_token_ts for r in records if r.first_token_ts), default=0.0),
        last_token_ts=max(r.last_token_ts for r in records),
        finished_ts=max(finished) if all(finished) else 0.0,
        first_token_latency=min((r.first_token_latency for r in records if r.first_token_ts), default=0.0),
    )


class _Counts:
    """A histogram in the making: observations per bucket, the one above the last bound included."""

    __slots__ = ("bounds", "counts", "name", "sum")

    def __init__(self, name: str, bounds: Sequence[float]):
        self.name = name
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def read(self) -> Histogram:
        buckets: dict[str, int] = {}
        total = 0
        for bound, count in zip((*map(_bound_name, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            buckets[bound] = total
        return Histogram(name=f"vjax:{self.name}", count=total, sum=self.sum, buckets=buckets)


def _bound_name(bound: float) -> str:
    """As prometheus_client writes it; from a million on all bounds are 1, 2 or 5 times a power of ten."""
    return str(float(bound)) if bound < 1_000_000 else f"{bound:.0e}"


def _one_two_five(largest: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 and so on, up to `largest`."""
    bounds = (m * 10**exponent for exponent in range(len(str(largest))) for m in (1, 2, 5))
    return [bound for bound in bounds if bound <= largest]


def _gauge(name: str, value: float, **labels: str) -> Gauge:
    return Gauge(name=f"vjax:{name}", labels=labels, value=float(value))


def _counter(name: str, value: int, **labels: str) -> Counter:
    return Counter(name=f"vjax:{name}", labels=labels, value=value)
