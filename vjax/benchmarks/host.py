"""The host's own work per step: schedule, pack, update. No device and no model: a step's tokens are made up.

Detokenisation and output building are not in it; they overlap with the device.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vjax.config.cache import CacheConfig
from vjax.config.scheduler import SchedulerConfig
from vjax.messages import EngineRequest, SchedulerOutput, StepOutput
from vjax.runner.buckets import Buckets
from vjax.runner.packing import PackedLayout
from vjax.sampling_params import SamplingParams
from vjax.scheduler.factory import make_scheduler

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCK_SIZE = 16
PROMPT_LEN = 512
MAX_NUM_BATCHED_TOKENS = 16384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[64, 256, 1024], help="running requests")
    parser.add_argument("--steps", type=int, default=256, help="measured decode steps")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record per number of running requests."""
    for num_seqs in args.num_seqs:
        yield measure(num_seqs, args.steps)


def row(record: dict[str, Any]) -> dict[str, str]:
    """The table's row."""
    parts = ("schedule", "pack", "update", "total")
    return {
        "running": str(record["num_seqs"]),
        "steps": str(record["steps"]),
        **{f"{part} ms": f"{record[f'{part}_ms']:.3f}" for part in parts},
        "total p99 ms": f"{record['total_p99_ms']:.3f}",
    }


def figure(records: Sequence[dict[str, Any]]) -> Figure:
    """The parts of a step, a bar per number of running requests."""
    from vjax import plot

    rows = {
        f"{record['num_seqs']} running": {part: record[f"{part}_ms"] for part in ("schedule", "pack", "update")}
        for record in records
    }
    title = "The host's own work in a decode step: it should grow no faster than the requests"
    return plot.phases(rows, xlabel="ms per step, medians", title=title, form=".3f")


def measure(num_seqs: int, num_steps: int) -> dict[str, float | int | str]:
    """Median milliseconds per decode step of each part, at `num_seqs` running requests, scheduling one step ahead."""
    # The first requests decode while the last ones prefill.
    num_prefill_steps = num_seqs * PROMPT_LEN // MAX_NUM_BATCHED_TOKENS + 2
    max_tokens = num_prefill_steps + num_steps + 8
    max_model_len = PROMPT_LEN + max_tokens
    blocks = num_seqs * (max_model_len // BLOCK_SIZE + 2) + 1
    scheduler = make_scheduler(
        SchedulerConfig(
            max_num_seqs=num_seqs,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
            max_model_len=max_model_len,
            enable_chunked_prefill=True,
            async_scheduling=True,
        ),
        CacheConfig(block_size=BLOCK_SIZE, num_gpu_blocks=blocks, enable_prefix_caching=True),
    )
    buckets = Buckets.build(max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS, max_num_seqs=num_seqs, platform="gpu")
    layouts = {b: PackedLayout.for_bucket(b, BLOCK_SIZE) for b in (*buckets.decode, *buckets.mixed)}
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    for i in range(num_seqs):
        prompt = [(i * 7919 + j * 31) % 32000 for j in range(PROMPT_LEN)]
        scheduler.add(EngineRequest(f"r{i}", prompt, params, None, float(i)))

    in_flight: deque[SchedulerOutput] = deque()
    times: dict[str, list[float]] = {"schedule": [], "pack": [], "update": [], "total": []}
    while len(times["total"]) < num_steps:
        t0 = time.perf_counter()
        scheduled = scheduler.schedule()
        t1 = time.perf_counter()
        bucket = buckets.forward_bucket(scheduled.num_tokens, len(scheduled.rows))
        layouts[bucket].pack(scheduled)
        in_flight.append(scheduled)
        t2 = t3 = time.perf_counter()
        if len(in_flight) > 1:
            oldest = in_flight.popleft()
            tokens = [(oldest.step_id * 13 + i) % 32000 for i in range(oldest.num_sampled)]
            t2b = time.perf_counter()
            scheduler.update(oldest, StepOutput(oldest.step_id, tokens))
            t3 = time.perf_counter()
            if scheduled.num_tokens == len(oldest.rows) == num_seqs:
                parts = (t1 - t0, t2 - t1, t3 - t2b)
                for name, seconds in zip(("schedule", "pack", "update", "total"), (*parts, sum(parts)), strict=True):
                    times[name].append(seconds * 1e3)
    medians = {f"{name}_ms": round(statistics.median(values), 4) for name, values in times.items()}
    p99 = sorted(times["total"])[int(0.99 * (len(times["total"]) - 1))]
    return {"bench": "host", "num_seqs": num_seqs, "steps": num_steps, **medians, "total_p99_ms": round(p99, 4)}
