"""What the engine counts and times: exactly, by a clock that only the device moves; and in agreement, in every mode."""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace

import pytest

from vjax import SamplingParams
from vjax.config.cache import CacheConfig
from vjax.config.engine_args import EngineArgs
from vjax.config.engine_config import EngineConfig, LoadConfig, ModelConfig
from vjax.config.scheduler import SchedulerConfig
from vjax.engine.builder import BuiltEngine
from vjax.engine.core import EngineCore
from vjax.engine.front import BaseLLMEngine
from vjax.engine.recorder import MetricsRecorder, merged
from vjax.engine.throughput import ThroughputLogger
from vjax.errors import EngineStepError
from vjax.messages import StepOutput
from vjax.metrics import Counter, Gauge, Histogram, Metric
from vjax.outputs import CompletionOutput, RequestMetrics, RequestOutput
from vjax.sampling_params import RequestOutputKind
from vjax.scheduler.factory import make_scheduler
from vjax.scheduler.stats import SchedulerStats

pytestmark = pytest.mark.usefixtures("shared_programs")

#: Seconds that a step takes on the device; exact in binary, as all times here.
STEP = 0.5
MAX_MODEL_LEN = 64
TOKEN = 7
PHASES = ("queue", "inference", "prefill", "decode")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Device:
    """Samples TOKEN for everybody, STEP seconds a step; the steps in `failing` fail."""

    def __init__(self, clock: Clock, failing=()):
        self.clock, self.failing = clock, failing

    def execute(self, scheduled):
        return Handle(self, scheduled)

    def reset(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


class Handle:
    def __init__(self, device: Device, scheduled):
        self.device, self.scheduled = device, scheduled

    def result(self) -> StepOutput:
        self.device.clock.now += STEP
        if self.scheduled.step_id in self.device.failing:
            raise EngineStepError("planted failure")
        return StepOutput(self.scheduled.step_id, [TOKEN] * self.scheduled.num_sampled)


@pytest.fixture
def make(monkeypatch):
    """Engines in front of a `Device`, with blocks of 4 tokens."""

    def make_engine(*, v1=True, overlapped=False, blocks=64, max_num_seqs=4, failing=(), log_stats=True):
        clock = Clock()
        cache = CacheConfig(block_size=4, num_gpu_blocks=blocks)
        scheduler = SchedulerConfig(max_num_seqs, 64, MAX_MODEL_LEN, async_scheduling=overlapped, static_batch=not v1)
        model = ModelConfig("m", "m", True, "float32", 0, MAX_MODEL_LEN)
        config = EngineConfig(model, cache, scheduler, LoadConfig(), not log_stats, v1)
        device = Device(clock, failing)
        core = EngineCore(make_scheduler(scheduler, cache, clock), device, async_scheduling=overlapped)
        arch = SimpleNamespace(vocab_size=1000, eos_token_ids=())
        monkeypatch.setattr("vjax.engine.front.build_engine", lambda args: BuiltEngine(core, config, arch, None))
        recorder = functools.partial(MetricsRecorder, clock=clock)
        monkeypatch.setattr("vjax.engine.front.MetricsRecorder", recorder)
        return BaseLLMEngine(EngineArgs(disable_log_stats=not log_stats)), clock

    return make_engine


def params(max_tokens: int, **fields) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **fields)


def run(engine) -> dict[str, RequestOutput]:
    """The last output of each request."""
    last = {}
    while engine.has_unfinished_requests():
        last |= {output.request_id: output for output in engine.step()}
    return last


def read(engine) -> dict[str, Metric]:
    """By name without the prefix, followed by the last label where there are some."""
    series = engine.get_metrics()
    assert all(m.name.startswith("vjax:") for m in series)
    named = {
        (m.name.removeprefix("vjax:") + ":" + (list(m.labels.values()) or [""])[-1]).rstrip(":"): m for m in series
    }
    assert len(named) == len(series)
    return named


def observed(histogram: Metric) -> dict[str, int]:
    """Observations per bucket, empty ones left out."""
    assert isinstance(histogram, Histogram)
    bounds = list(histogram.buckets)
    counts = list(histogram.buckets.values())
    assert bounds[-1] == "+Inf" and counts[-1] == histogram.count and counts == sorted(counts)
    each = (b - a for a, b in itertools.pairwise([0, *counts]))
    return {bound: count for bound, count in zip(bounds, each, strict=True) if count}


# ---- exactly ------------------------------------------------------------------------------------------------------


def test_every_series_of_a_small_run(make):
    """One row. `a` runs from 100.0 to 101.5; `b` waits for it and runs until 102.5."""
    engine, clock = make(max_num_seqs=1)
    engine.add_request("a", [1, 2, 3], params(3, output_kind=RequestOutputKind.FINAL_ONLY), arrival_time=99.0)
    engine.add_request("b", [4, 5], params(2, output_kind=RequestOutputKind.DELTA), arrival_time=99.5)
    outputs = run(engine)
    assert clock.now == 102.5
    series = read(engine)

    histograms = {name: m for name, m in series.items() if isinstance(m, Histogram)}
    assert {name: (m.sum, observed(m)) for name, m in histograms.items()} == {
        "time_to_first_token_seconds": (1.5 + 2.5, {"2.5": 2}),
        "inter_token_latency_seconds": (1.5, {"0.5": 3}),
        "request_time_per_output_token_seconds": (1.0, {"0.5": 2}),
        "e2e_request_latency_seconds": (2.5 + 3.0, {"2.5": 1, "5.0": 1}),
        "request_queue_time_seconds": (0.0 + 1.5, {"0.3": 1, "1.5": 1}),
        "request_inference_time_seconds": (1.5 + 1.0, {"1.0": 1, "1.5": 1}),
        "request_prefill_time_seconds": (0.5 + 0.5, {"0.5": 2}),
        "request_decode_time_seconds": (1.0 + 0.5, {"0.5": 1, "1.0": 1}),
        "request_prompt_tokens": (5.0, {"2.0": 1, "5.0": 1}),
        "request_generation_tokens": (5.0, {"2.0": 1, "5.0": 1}),
        "request_prefill_kv_computed_tokens": (5.0, {"2.0": 1, "5.0": 1}),
        "request_max_num_generation_tokens": (5.0, {"2.0": 1, "5.0": 1}),
        "request_params_max_tokens": (5.0, {"2.0": 1, "5.0": 1}),
        "request_params_n": (2.0, {"1.0": 2}),
        "request_num_preemptions": (0.0, {"0.0": 2}),
        "iteration_tokens_total": (10.0, {"1.0": 3, "8.0": 2}),
    }
    values = {name: m.value for name, m in series.items() if isinstance(m, (Counter, Gauge))}
    assert values == {
        "num_requests_running": 0,
        "num_requests_waiting": 0,
        "kv_cache_usage_perc": 0,
        "cache_config_info:64": 1,
        "prefix_cache_queries": 5,
        "prefix_cache_hits": 0,
        "num_preemptions": 0,
        "prompt_tokens": 5,
        "prompt_tokens_cached": 0,
        "prompt_tokens_by_source:local_compute": 5,
        "prompt_tokens_by_source:local_cache_hit": 0,
        "generation_tokens": 5,
        "request_success:stop": 0,
        "request_success:length": 2,
        "request_success:abort": 0,
        "request_success:error": 0,
        "request_success:repetition": 0,
    }
    info = series["cache_config_info:64"].labels
    assert (info["block_size"], info["num_gpu_blocks"], info["enable_prefix_caching"]) == ("4", "64", "True")

    b = outputs["b"].metrics
    assert b is not None
    assert (b.arrival_ts, b.queued_ts, b.scheduled_ts) == (99.5, 100.0, 101.5)
    assert (b.first_token_ts, b.last_token_ts, b.finished_ts) == (102.0, 102.5, 102.5)
    assert (b.first_token_latency, b.queued_time, b.time_in_queue) == (2.5, 1.5, 2.0)
    assert (b.prefill_time, b.decode_time, b.inference_time, b.e2e_latency) == (0.5, 0.5, 1.0, 3.0)
    assert (b.num_generation_tokens, b.mean_time_per_output_token, b.num_preemptions) == (2, 0.5, 0)
    # V0's names, in wall time.
    assert b.arrival_time > 1e9
    wall = (b.first_scheduled_time, b.first_token_time, b.last_token_time, b.finished_time)
    assert [t - b.arrival_time for t in wall if t is not None] == pytest.approx([2.0, 2.5, 3.0, 3.0], abs=1e-5)


def test_names_and_buckets_are_those_of_vllm(make):
    series = read(make()[0])
    seconds = "0.3 0.5 0.8 1.0 1.5 2.0 2.5 5.0 10.0 15.0 20.0 30.0 40.0 50.0 60.0 120.0 240.0 480.0 960.0 1920.0 7680.0"
    tokens = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0"
    first = (
        "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0 160.0 640.0 2560.0"
    )
    lengths = "1.0 2.0 5.0 10.0 20.0 50.0"
    expected = {
        "time_to_first_token_seconds": first,
        "inter_token_latency_seconds": tokens,
        "request_time_per_output_token_seconds": tokens,
        **dict.fromkeys(
            ["e2e_request_latency_seconds", *(f"request_{p}_time_seconds" for p in PHASES)],
            seconds,
        ),
        **dict.fromkeys(
            [
                "request_prompt_tokens",
                "request_generation_tokens",
                "request_prefill_kv_computed_tokens",
                "request_max_num_generation_tokens",
                "request_params_max_tokens",
            ],
            lengths,
        ),
        "request_params_n": "1.0 2.0 5.0 10.0 20.0",
        "request_num_preemptions": "0.0 1.0 2.0 5.0 10.0 20.0",
        "iteration_tokens_total": "1.0 8.0 16.0 32.0 64.0 128.0 256.0 512.0 1024.0 2048.0 4096.0 8192.0 16384.0",
    }
    bounds = {name: " ".join(m.buckets) for name, m in series.items() if isinstance(m, Histogram)}
    assert bounds == {name: f"{text} +Inf" for name, text in expected.items()}
    assert all(m.count == m.sum == 0 for m in series.values() if isinstance(m, Histogram))


def test_bounds_of_a_long_context():
    recorder = MetricsRecorder(2_000_000, CacheConfig(), Clock())
    (lengths,) = [m for m in recorder.snapshot(SchedulerStats()) if m.name == "vjax:request_prompt_tokens"]
    assert isinstance(lengths, Histogram)
    assert list(lengths.buckets)[-5:] == ["200000.0", "500000.0", "1e+06", "2e+06", "+Inf"]


def test_a_gap_is_one_long_latency(make):
    """That of a preempted request is as long as it takes to come back."""
    engine, _ = make(blocks=6, max_num_seqs=2)  # 5 blocks of 4: one request needs 3 of them, two need 6
    engine.add_request("a", [1] * 7, params(5), arrival_time=100.0)
    engine.add_request("b", [2] * 7, params(5), arrival_time=100.0)
    outputs = run(engine)
    b = outputs["b"].metrics
    series = read(engine)
    assert b is not None and b.num_preemptions == 1
    assert series["num_preemptions"].value == 1
    assert observed(series["request_num_preemptions"]) == {"0.0": 1, "1.0": 1}
    # Both have 2 tokens at 101.0; `a` alone has 5 at 102.5; then `b` comes back, for its third token at 103.0.
    assert observed(series["inter_token_latency_seconds"]) == {"0.5": 7, "2.5": 1}
    assert series["inter_token_latency_seconds"].sum == 7 * 0.5 + 2.0
    assert (b.queued_time, b.scheduled_ts, b.first_token_ts, b.last_token_ts) == (0.0, 100.0, 100.5, 104.0)
    assert series["prompt_tokens"].value == 14, "a prompt that is computed again is not counted again"


@pytest.mark.parametrize("overlapped", [False, True], ids=["plain", "async"])
def test_aborted_requests(make, overlapped):
    """One while it runs, one while it waits."""
    engine, _ = make(max_num_seqs=1, overlapped=overlapped)
    engine.add_request("runs", [1, 2, 3], params(20), arrival_time=100.0)
    engine.add_request("waits", [1, 2, 3], params(20), arrival_time=100.0)
    for _ in range(3 + overlapped):
        engine.step()
    engine.abort_request(["runs", "waits", "unknown"])
    engine.abort_request("runs")
    run(engine)
    series = read(engine)
    assert series["request_success:abort"].value == 2
    assert observed(series["request_generation_tokens"]) == {"1.0": 1, "5.0": 1}
    assert (series["e2e_request_latency_seconds"].count, series["e2e_request_latency_seconds"].sum) == (2, 3.0)
    for name in ("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"):
        assert series[name].count == 1, name
    assert series["request_decode_time_seconds"].sum == 1.0


def test_a_step_that_never_reached_the_device_leaves_no_trace(make, monkeypatch):
    engine, clock = make()
    runner = engine._core.runner

    def interrupted(scheduled):
        raise KeyboardInterrupt

    engine.add_request("r", [1, 2, 3], params(2), arrival_time=100.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runner, "execute", interrupted)
        engine.step()
    (request,) = engine._core.scheduler._state.requests.values()
    assert request.metrics.scheduled_ts == 0.0
    clock.now += 3.0
    metrics = run(engine)["r"].metrics
    assert metrics is not None
    assert (metrics.scheduled_ts, metrics.queued_time, metrics.first_token_ts) == (103.0, 3.0, 103.5)
    series = read(engine)
    assert series["prefix_cache_queries"].value == series["prompt_tokens"].value == 3
    assert series["request_queue_time_seconds"].count == 1


def test_the_completions_of_a_prompt(make):
    """Three completions on two rows: the third follows when the first two are done."""
    engine, _ = make(max_num_seqs=2)
    engine.add_request("r", [1, 2, 3], params(2, n=3), arrival_time=99.0)
    metrics = run(engine)["r"].metrics
    assert metrics is not None
    assert (metrics.scheduled_ts, metrics.first_token_ts, metrics.last_token_ts) == (100.0, 100.5, 102.0)
    assert (metrics.finished_ts, metrics.first_token_latency, metrics.num_generation_tokens) == (102.0, 1.5, 6)
    series = read(engine)
    assert observed(series["request_params_n"]) == {"5.0": 1}
    assert observed(series["request_max_num_generation_tokens"]) == {"2.0": 1}
    assert observed(series["request_generation_tokens"]) == {"2.0": 3}
    assert (series["time_to_first_token_seconds"].count, series["time_to_first_token_seconds"].sum) == (
        3,
        1.5 * 2 + 2.5,
    )


def test_merged_before_all_have_begun():
    early = RequestMetrics(queued_ts=1.0, scheduled_ts=2.0, first_token_ts=3.0, last_token_ts=4.0, finished_ts=4.0)
    both = merged([early, RequestMetrics(queued_ts=1.0)])
    assert (both.scheduled_ts, both.first_token_ts, both.last_token_ts, both.finished_ts) == (2.0, 3.0, 4.0, 0.0)
    assert both.e2e_latency is None and both.finished_time is None


# ---- in agreement -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [(), (9,)], ids=["", "failure"])
@pytest.mark.parametrize("overlapped", [False, True], ids=["plain", "async"])
@pytest.mark.parametrize("v1", [False, True], ids=["V0", "V1"])
def test_sums_and_counts_agree(make, v1, overlapped, failing):
    engine, clock = make(v1=v1, overlapped=overlapped, blocks=13, failing=failing)
    shared = list(range(10, 22))
    prompts = [([*shared, i], 1 + i % 3, 3 + 2 * i) for i in range(8)]
    for i, (prompt, n, max_tokens) in enumerate(prompts):
        engine.add_request(f"r{i}", prompt, params(max_tokens, n=n), arrival_time=clock.now - 1.0 - i)
    completions: dict[tuple[str, int], CompletionOutput] = {}
    for step in itertools.count():
        if not engine.has_unfinished_requests():
            break
        if step == 12:
            engine.abort_request(["r1", "r7"])
        completions |= {(o.request_id, c.index): c for o in engine.step() for c in o.outputs}
    series = read(engine)
    count = {name: m.count for name, m in series.items() if isinstance(m, Histogram)}
    total = {name: m.sum for name, m in series.items() if isinstance(m, Histogram)}
    value = {name: m.value for name, m in series.items() if isinstance(m, (Counter, Gauge))}

    reasons = [c.finish_reason for c in completions.values()]
    ended = {reason: value[f"request_success:{reason}"] for reason in ("stop", "length", "abort", "error")}
    num_completions = sum(n for _, n, _ in prompts)
    assert ended["length"] == reasons.count("length") > 0 and ended["stop"] == 0
    assert ended["error"] == reasons.count("error") and bool(ended["error"]) == bool(failing)
    assert ended["abort"] > 0 and sum(ended.values()) == num_completions
    for name in ("prompt_tokens", "generation_tokens", "params_max_tokens", "num_preemptions"):
        assert count[f"request_{name}"] == num_completions, name
    assert count["e2e_request_latency_seconds"] == num_completions
    assert count["request_params_n"] == count["request_max_num_generation_tokens"] == len(prompts)
    assert total["request_params_n"] == num_completions

    assert value["num_preemptions"] == total["request_num_preemptions"] > 0
    assert value["prefix_cache_hits"] >= value["prompt_tokens_cached"] > 0
    num_tokens = sum(len(c.token_ids) for c in completions.values())
    assert value["generation_tokens"] == total["request_generation_tokens"] == num_tokens
    sources = value["prompt_tokens_by_source:local_compute"], value["prompt_tokens_by_source:local_cache_hit"]
    assert value["prompt_tokens"] == sum(sources) == len(prompts[0][0]) * count["time_to_first_token_seconds"]
    assert sources == (total["request_prefill_kv_computed_tokens"], value["prompt_tokens_cached"])
    assert total["iteration_tokens_total"] == value["prompt_tokens"] + value["generation_tokens"]

    began = count["time_to_first_token_seconds"]
    for phase in ("prefill", "decode", "inference"):
        assert count[f"request_{phase}_time_seconds"] == began, phase
    assert began <= count["request_queue_time_seconds"] <= num_completions
    assert count["inter_token_latency_seconds"] == value["generation_tokens"] - began
    assert total["inter_token_latency_seconds"] == total["request_decode_time_seconds"]
    prefill_and_decode = total["request_prefill_time_seconds"] + total["request_decode_time_seconds"]
    assert total["request_inference_time_seconds"] == prefill_and_decode
    assert value["num_requests_running"] == value["num_requests_waiting"] == value["kv_cache_usage_perc"] == 0


def test_nothing_is_recorded_without_statistics(make):
    engine, _ = make(log_stats=False)
    engine.add_request("a", [1, 2, 3], params(3, n=2))
    requests = list(engine._core.scheduler._state.requests.values())
    assert [r.metrics for r in requests] == [None, None]
    assert run(engine)["a"].metrics is None
    assert engine._recorder is None


# ---- the line in the log ------------------------------------------------------------------------------------------


@pytest.fixture
def records(monkeypatch):
    """(line, numbers) of each."""
    found = []

    def info(form, *values, extra):
        found.append((form % values, extra["fields"]))

    monkeypatch.setattr("vjax.engine.throughput._log.info", info)
    return found


def test_throughput_line(records):
    now = 100.0
    stats = SchedulerStats(num_running=3, num_waiting=4, kv_cache_usage=0.5)
    throughput = ThroughputLogger()
    for _ in range(6):
        throughput.record(stats, now)
        now += 1.0
        stats.prompt_tokens += 100
        stats.generation_tokens += 10
    stats.prefix_cache_requests, stats.prefix_cache_queries, stats.prefix_cache_hits = 1, 8, 2
    ((line, numbers),) = records
    assert line == (
        "Avg prompt throughput: 100.0 tokens/s, Avg generation throughput: 10.0 tokens/s, Running: 3 reqs, "
        "Waiting: 4 reqs, KV cache usage: 50.0%, Prefix cache hit rate: 0.0%"
    )
    assert numbers == {
        "prompt_tokens_per_second": 100.0,
        "generation_tokens_per_second": 10.0,
        "num_requests_running": 3,
        "num_requests_waiting": 4,
        "kv_cache_usage_percent": 50.0,
        "prefix_cache_hit_rate_percent": 0.0,
    }
    now += 3600  # idle
    for _ in range(6):
        throughput.record(stats, now)
        now += 1.0
        stats.generation_tokens += 20
    assert len(records) == 2
    assert "Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: 20.0 tokens/s" in records[1][0]
    assert records[1][0].endswith("Prefix cache hit rate: 25.0%")


def test_hit_rate_is_that_of_the_latest_requests(records):
    stats = SchedulerStats()
    throughput = ThroughputLogger()
    for second in range(11):
        stats.prefix_cache_requests += 500
        stats.prefix_cache_queries += 5000
        stats.prefix_cache_hits += 4000 if second >= 7 else 0
        throughput.record(stats, float(second))
    rates = [numbers["prefix_cache_hit_rate_percent"] for _, numbers in records]
    assert rates == [0.0, 80.0]
