from __future__ import annotations

import pytest

from vjax.messages import EngineOutput
from vjax.metrics import Counter, EngineMetrics, Gauge, Histogram, ThroughputLogger
from vjax.scheduler.stats import SchedulerStats


def test_snapshot():
    metrics = EngineMetrics()
    stats = SchedulerStats(num_running=2, num_waiting=1, kv_cache_usage=0.25)
    stats.prefix_cache_queries, stats.prefix_cache_hits, stats.num_preemptions = 40, 10, 3
    stats.prompt_tokens, stats.generation_tokens = 30, 2
    metrics.record(stats, [EngineOutput("a", [1]), EngineOutput("b", [1], "stop"), EngineOutput("c", [], "length")])
    stats.generation_tokens = 4
    metrics.record(stats, [EngineOutput("a", [1], "stop")])
    metrics.record(stats, [])
    series = {(m.name, *m.labels.values()): m for m in metrics.snapshot(stats)}
    assert series["vjax:num_requests_running",] == Gauge(name="vjax:num_requests_running", value=2.0)
    assert series["vjax:num_requests_waiting",] == Gauge(name="vjax:num_requests_waiting", value=1.0)
    assert series["vjax:kv_cache_usage_perc",] == Gauge(name="vjax:kv_cache_usage_perc", value=0.25)
    counters = {name: m.value for name, m in series.items() if isinstance(m, Counter)}
    assert counters == {
        ("vjax:prefix_cache_queries",): 40,
        ("vjax:prefix_cache_hits",): 10,
        ("vjax:num_preemptions",): 3,
        ("vjax:prompt_tokens",): 30,
        ("vjax:generation_tokens",): 4,
        ("vjax:request_success", "stop"): 2,
        ("vjax:request_success", "length"): 1,
        ("vjax:request_success", "abort"): 0,
        ("vjax:request_success", "error"): 0,
    }
    tokens = series["vjax:iteration_tokens_total",]
    assert isinstance(tokens, Histogram)
    assert (tokens.count, tokens.sum) == (2, 34.0)
    assert (tokens.buckets["1"], tokens.buckets["8"], tokens.buckets["32"], tokens.buckets["+Inf"]) == (0, 1, 2, 2)


@pytest.fixture
def lines(monkeypatch):
    records: list[str] = []
    monkeypatch.setattr("vjax.metrics._log.info", lambda form, *values: records.append(form % values))
    return records


def test_throughput_line(lines):
    now = [100.0]
    stats = SchedulerStats(num_running=3, num_waiting=4, kv_cache_usage=0.5)
    throughput = ThroughputLogger(clock=lambda: now[0])
    for _ in range(6):
        throughput.record(stats)
        now[0] += 1.0
        stats.prompt_tokens += 100
        stats.generation_tokens += 10
    stats.prefix_cache_queries, stats.prefix_cache_hits = 8, 2
    assert lines == [
        "Avg prompt throughput: 100.0 tokens/s, Avg generation throughput: 10.0 tokens/s, Running: 3 reqs, "
        "Waiting: 4 reqs, KV cache usage: 50.0%, Prefix cache hit rate: 0.0%"
    ]
    now[0] += 3600  # idle
    for _ in range(6):
        throughput.record(stats)
        now[0] += 1.0
        stats.generation_tokens += 20
    assert len(lines) == 2
    assert "Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: 20.0 tokens/s" in lines[1]
    assert lines[1].endswith("Prefix cache hit rate: 25.0%")
