"""`vjax bench startup`: seconds from starting Python to an engine that serves, and to its first token.

Cold starts find an empty compile cache, warm ones that of an earlier start. The operating system's cache of files is
left as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vjax import envs
from vjax.benchmarks.arguments import natural, positive
from vjax.benchmarks.process import call
from vjax.benchmarks.records import Record, caption
from vjax.config.engine_args import EngineArgs
from vjax.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PROMPT_LEN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-iters-cold", type=natural, default=3, help="cold starts (default: %(default)s)")
    parser.add_argument(
        "--num-iters-warmup", type=positive, default=1, help="starts that fill the cache (default: %(default)s)"
    )
    parser.add_argument("--num-iters-warm", type=natural, default=3, help="warm starts (default: %(default)s)")


def run(args: argparse.Namespace, engine: EngineArgs) -> Iterator[Record]:
    """A record of the cold starts and one of the warm ones."""
    if not args.num_iters_cold and not args.num_iters_warm:
        raise ConfigError("--num-iters-cold and --num-iters-warm are both 0; at least one must be more.")
    from tqdm import tqdm

    with tqdm(
        total=args.num_iters_cold + (args.num_iters_warmup + args.num_iters_warm) * bool(args.num_iters_warm),
        desc="Starts",
        disable=not sys.stderr.isatty(),
    ) as progress:

        def start(folder: str) -> Record:
            result = _start(engine, folder)
            progress.update()
            return result

        cold = []
        for _ in range(args.num_iters_cold):
            with tempfile.TemporaryDirectory() as folder:
                cold.append(start(folder))
        if cold:
            yield _record("cold", cold)
        if args.num_iters_warm:
            with tempfile.TemporaryDirectory() as folder:
                for _ in range(args.num_iters_warmup):
                    start(folder)
                yield _record("warm", [start(folder) for _ in range(args.num_iters_warm)])


def measure_in_child(engine: dict[str, Any], started: float) -> Record:
    """Builds an engine and draws a token.

    Args:
        started: `time.time()` when the process was started.
    """
    import_started = time.perf_counter()
    from vjax.llm import LLM
    from vjax.sampling_params import SamplingParams

    engine_started = time.perf_counter()
    args = EngineArgs(**engine)
    with LLM.from_engine_args(args) as llm:
        ready, ready_at = time.perf_counter(), time.time()
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
        llm.generate({"prompt_token_ids": list(range(_PROMPT_LEN))}, params, use_tqdm=False)
        first_token_at = time.time()
        from vjax.benchmarks.records import setting

        return {
            "import_time": engine_started - import_started,
            "engine_time": ready - engine_started,
            "startup_time": ready_at - started,
            "first_token_time": first_token_at - started,
            "setting": setting(args, llm),
        }


def row(record: Record) -> dict[str, str]:
    """The table's row."""
    return {
        "compile cache": record["cache"],
        "starts": str(len(record["startup_times"])),
        "import s": f"{record['avg_import_time']:.2f}",
        "engine s": f"{record['avg_engine_time']:.2f}",
        "ready after s": f"{record['avg_startup_time']:.2f}",
        "first token after s": f"{record['avg_first_token_time']:.2f}",
    }


def figure(records: Sequence[Record]) -> Figure:
    """Where the seconds to the first token go, a bar per state of the compile cache."""
    from vjax import plot

    rows = {
        f"{record['cache']} compile cache": {
            "Python": record["avg_startup_time"] - record["avg_import_time"] - record["avg_engine_time"],
            "import": record["avg_import_time"],
            "engine": record["avg_engine_time"],
            "first token": record["avg_first_token_time"] - record["avg_startup_time"],
        }
        for record in records
    }
    title = f"Start: where the time to the first token goes\n{caption(records[0])}"
    return plot.phases(rows, xlabel="seconds since the process was started, mean over the starts", title=title)


def _start(engine: EngineArgs, cache_dir: str) -> Record:
    environment = envs.with_compile_cache(cache_dir)
    return call("startup", {"engine": dataclasses.asdict(engine), "started": time.time()}, environment)


def _record(cache: str, starts: list[Record]) -> Record:
    from vjax.benchmarks.records import percentiles

    record: Record = {"bench": "startup", "cache": cache}
    for name in ("startup_time", "import_time", "engine_time", "first_token_time"):
        times = [start[name] for start in starts]
        record |= {f"avg_{name}": sum(times) / len(times), f"{name}s": times}
    record["percentiles"] = percentiles(record["startup_times"])
    return record | starts[0]["setting"]
