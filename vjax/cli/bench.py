"""`vjax bench`: benchmarks. A JSON line per result to standard output or a file, then a table to standard error."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from vjax.cli import engine_options
from vjax.cli.output import open_output
from vjax.errors import EngineStepError


class _Bench(NamedTuple):
    #: Module of vjax.benchmarks: add_arguments, run, row and figure.
    module: str
    help: str
    description: str
    #: Takes engine arguments.
    has_engine: bool = True
    #: Takes --plot; what does not draws its figure itself.
    has_plot: bool = True


_BENCHES = {
    "latency": _Bench(
        "latency",
        "seconds per batch",
        "Seconds that one batch of requests takes from its prompts to its last token.",
    ),
    "throughput": _Bench(
        "throughput",
        "requests and tokens per second",
        "Requests and tokens per second when all requests are there at once.",
    ),
    "prefix-caching": _Bench(
        "prefix_caching",
        "what prefix caching saves",
        "The same prompts with and without prefix caching. --engine.enable_prefix_caching chooses one of the two.",
    ),
    "startup": _Bench(
        "startup",
        "seconds until the engine serves",
        "Seconds from starting Python to an engine that serves, with an empty compile cache and with a filled one.",
    ),
    "host": _Bench(
        "host",
        "the host's own work per step",
        "Median milliseconds that scheduling, packing and updating take per decode step. Needs no GPU.",
        has_engine=False,
    ),
    "compare": _Bench(
        "compare",
        "V0 and V1 side by side, as a picture",
        "The same requests in V0 and V1 mode, each in a process of its own, as records and as a picture.",
        has_plot=False,
    ),
}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("bench", help="measure the engine", description="Benchmarks of the engine.")
    benches = parser.add_subparsers(dest="bench", metavar="BENCH", required=True)
    for name, bench in _BENCHES.items():
        sub = benches.add_parser(
            name,
            allow_abbrev=False,
            help=bench.help,
            description=bench.description,
            epilog=engine_options.EPILOG if bench.has_engine else None,
        )
        if bench.has_engine:
            engine_options.add_model(sub)
        _module(bench).add_arguments(sub)
        if bench.has_plot:
            sub.add_argument("--plot", metavar="FILE", type=Path, help="a picture of the results: .png, .svg or .pdf")
        sub.add_argument("--output-json", metavar="FILE", type=Path, help="where the JSON lines go")
        sub.set_defaults(handler=handle, takes_overrides=("engine",) if bench.has_engine else ())


def handle(args: argparse.Namespace) -> int:
    from vjax import plot
    from vjax.benchmarks.process import ProcessFailed
    from vjax.benchmarks.records import table

    bench = _BENCHES[args.bench]
    module = _module(bench)
    inputs = [_engine(args)] if bench.has_engine else []
    picture = args.plot if bench.has_plot else None
    if picture is not None:
        plot.check(picture)
    records, rows = [], []
    try:
        with open_output(args.output_json) as stream:
            for record in module.run(args, *inputs):
                stream.write(json.dumps(record) + "\n")
                records.append(record)
                rows.append(module.row(record))
                if args.output_json is None:
                    sys.stdout.flush()
    except (EngineStepError, ProcessFailed) as e:
        print(f"vjax: {e}", file=sys.stderr)
        return 1
    print(table(rows), file=sys.stderr)
    if args.output_json is not None:
        print(f"wrote {len(rows)} results to {args.output_json}", file=sys.stderr)
    if picture is not None:
        plot.save(module.figure(records), picture)
        print(f"wrote {picture}", file=sys.stderr)
    return 0


def _engine(args: argparse.Namespace) -> Any:
    from vjax.config.engine_args import EngineArgs

    return EngineArgs.from_kwargs(**engine_options.engine_arguments(args, f"vjax bench {args.bench}"))


def _module(bench: _Bench) -> Any:
    return importlib.import_module(f"vjax.benchmarks.{bench.module}")
