"""`--profile DIR`: a trace of decode steps, and a picture of one step against what the device allows."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vjax.benchmarks.records import Record
from vjax.benchmarks.workloads import Request
from vjax.errors import ConfigError

if TYPE_CHECKING:
    from vjax.llm import LLM

_STEPS = 8
_READS = 32
_WARM_STEPS = 4
#: Timed without a trace, which slows the host: steps of few rows then wait for it.
_TIMED_STEPS = 32
#: Traced, but not looked at: the first launches that are recorded take longer.
_FIRST_STEPS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        metavar="DIR",
        type=Path,
        help="write a trace of decode steps (for XProf or Perfetto), step.json and step.png; needs a GPU",
    )


def check(folder: Path, output_len: int) -> None:
    """To be called before the work starts.

    Raises:
        ConfigError: matplotlib is not installed, a file cannot be written, or the outputs are too short to trace.
    """
    from vjax import plot

    least = _WARM_STEPS + _TIMED_STEPS + _FIRST_STEPS + _STEPS + 2
    if output_len < least:
        raise ConfigError(f"--profile needs at least {least} output tokens, not {output_len}; raise --output-len.")
    plot.check(folder / "step.png")


def check_device() -> None:
    """To be called once the engine has started JAX.

    Raises:
        ConfigError: JAX does not run on a GPU.
    """
    import jax

    if jax.default_backend() != "gpu":
        raise ConfigError(f"--profile traces a GPU's kernels, and JAX runs on {jax.default_backend()}; leave it out.")


def profile(llm: LLM, requests: Sequence[Request], folder: Path) -> Record:
    """Runs the requests once more, traces some steps in which all of them decode, and writes what it found.

    Args:
        requests: Seen by `measure.prepare` and `check`; as many as can run at once.

    Returns:
        Seconds a step: in all ("step_seconds") without a trace and with one; by category of kernels; the time in which
        any kernel ran ("busy"); and what reading the weights and the cache takes at the bandwidth that this device
        reaches. "coverage" is what kernels take of a step without a trace, "traced_coverage" the share of the traced
        time in which a launch was under way, that of a whole graph as one.
    """
    import jax

    from vjax.benchmarks import step_picture, trace
    from vjax.sampling_params import RequestOutputKind, SamplingParams

    engine = llm.llm_engine
    for index, request in enumerate(requests):
        engine.add_request(
            f"profile-{index}",
            {"prompt_token_ids": request.prompt_token_ids},
            SamplingParams(
                temperature=0,
                max_tokens=request.output_len,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            ),
        )
    decoding = 0
    while decoding < _WARM_STEPS:
        decoding = decoding + 1 if len(engine.step()) == len(requests) else 0
    started = time.perf_counter()
    for _ in range(_TIMED_STEPS):
        engine.step()
    step_seconds = (time.perf_counter() - started) / _TIMED_STEPS
    options = jax.profiler.ProfileOptions()
    # Calls of Python functions: recording them slows the host until the device waits for it.
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=options):
        for _ in range(_FIRST_STEPS + _STEPS):
            engine.step()
    while engine.has_unfinished_requests():
        engine.step()
    kernels = trace.read_kernels(folder)
    # Every step has as many.
    kernels = kernels[len(kernels) * _FIRST_STEPS // (_FIRST_STEPS + _STEPS) :]
    used = trace.usage(kernels)
    bandwidth = _read_bandwidth()
    num_before = _WARM_STEPS + _TIMED_STEPS + _FIRST_STEPS
    num_keys = sum(len(r.prompt_token_ids) + num_before + _STEPS // 2 for r in requests)
    busy = used.busy / _STEPS
    record = {
        "num_requests": len(requests),
        "num_steps": _STEPS,
        "step_seconds": step_seconds,
        "traced_step_seconds": used.span / _STEPS,
        "busy_seconds": busy,
        "coverage": min(1.0, busy / step_seconds),
        "traced_coverage": used.coverage,
        "kernels": {name: seconds / _STEPS for name, seconds in used.by_category.items()},
        "num_kernels": {name: count / _STEPS for name, count in used.counts.items()},
        "read_bytes_per_second": bandwidth,
        "least_seconds": {name: size / bandwidth for name, size in engine.least_bytes_read(num_keys).items()},
    }
    (folder / "step.json").write_text(json.dumps(record, indent=1) + "\n")
    step_picture.draw(record, kernels, folder / "step.png")
    return record


def _read_bandwidth() -> float:
    """Bytes a second that a sum over 512 MiB reads: calls queued behind each other, the best of three rounds."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((1 << 13, 1 << 14), jnp.float32)
    total = jax.jit(jnp.sum)
    best = float("inf")
    for _ in range(4):  # the first one compiles
        start = time.perf_counter()
        jax.block_until_ready([total(x) for _ in range(_READS)])
        best = min(best, time.perf_counter() - start)
    return _READS * x.nbytes / best
