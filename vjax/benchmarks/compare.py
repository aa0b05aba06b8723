"""`vjax bench compare`: the same requests in V0 and in V1 mode, as records and as a picture."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vjax.benchmarks import datasets, throughput
from vjax.benchmarks.arguments import positive, temperature
from vjax.benchmarks.datasets import Dataset
from vjax.benchmarks.process import call
from vjax.benchmarks.records import Record, caption
from vjax.config.engine_args import EngineArgs
from vjax.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODES = ("V0", "V1")
_DATASETS = ("random", "sharegpt", "prefix_repetition")
#: What the modes would otherwise choose differently, or large: the same limits for both, right for a CPU.
_LIMITS: dict[str, int] = {"max_num_seqs": 16, "max_model_len": 512, "max_num_batched_tokens": 512}
#: Sizes that a CPU works off in seconds.
_LENGTHS = {
    "input_len": 32,
    "random_output_len": 50,
    "prefix_repetition_prefix_len": 192,
    "prefix_repetition_suffix_len": 32,
    "prefix_repetition_num_prefixes": 4,
    "prefix_repetition_output_len": 16,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("modes", nargs="*", type=_mode, metavar="MODE", help="V0 and V1 (default: both)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", default=Path("vjax-compare.png"), help="the picture (%(default)s)"
    )
    parser.add_argument(
        "--dataset-name",
        nargs="+",
        choices=datasets.NAMES,
        default=list(_DATASETS),
        help=f"workloads (default: {' '.join(_DATASETS)}, with lengths for the bundled model on a CPU)",
    )
    parser.add_argument("--num-prompts", type=positive, default=48, help="requests of each (default: %(default)s)")
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0 is greedy (default: %(default)s)")
    datasets.add_arguments(parser, _LENGTHS)
    parser.epilog = f"{parser.epilog} Unless given, {', '.join(f'{name}={n}' for name, n in _LIMITS.items())}."


def run(args: argparse.Namespace, engine: EngineArgs) -> Iterator[Record]:
    """A record per mode and workload; draws the picture when all are there.

    Each mode has a process of its own, one after the other, so that they share neither memory nor compiled programs.
    """
    from vjax import plot

    modes = args.modes or list(MODES)
    for what, names in (("mode", modes), ("workload", args.dataset_name)):
        if len(set(names)) < len(names):
            raise ConfigError(f"The {what}s {' '.join(names)} are not all different; name each one once.")
    if engine.use_v1 is not None:
        raise ConfigError(f"use_v1={engine.use_v1} and the modes say the same twice; leave --engine.use_v1 out.")
    chosen = datasets.chosen(args, args.dataset_name, _LENGTHS)
    plot.check(args.output)
    limits: dict[str, Any] = {name: n for name, n in _LIMITS.items() if getattr(engine, name) is None}
    records: list[Record] = []
    for mode in modes:
        print(f"{mode}: {len(chosen)} workloads of {args.num_prompts} requests", file=sys.stderr)
        asked = dataclasses.replace(engine, use_v1=mode == "V1", disable_log_stats=False, **limits)
        arguments = {
            "engine": dataclasses.asdict(asked),
            "chosen": [dataclasses.asdict(dataset) for dataset in chosen],
            "temperature": args.temperature,
            "detokenize": False,
        }
        for measured in call("throughput", arguments):
            records.append(measured | {"bench": "compare", "mode": mode})
            yield records[-1]
    plot.save(figure(records), args.output)
    print(f"wrote {args.output}", file=sys.stderr)


def row(record: Record) -> dict[str, str]:
    """The table's row."""
    return {
        "mode": record["mode"],
        **throughput.row(record),
        "cached": str(record["num_cached_tokens"]),
        "first token after s": f"{record['mean_first_token_latency']:.3f}",
    }


def figure(records: Sequence[Record]) -> Figure:
    """Throughput and time to the first token, a group of bars per workload and a bar per mode.

    Args:
        records: As many of each workload as there are modes.
    """
    from vjax import plot

    modes = list(dict.fromkeys(r["mode"] for r in records))
    panels = {
        name: {mode: [r[key] for r in records if r["mode"] == mode] for mode in modes}
        for name, key in (
            ("output tokens per second", "output_tokens_per_second"),
            ("mean seconds to the first token", "mean_first_token_latency"),
        )
    }
    labels = list(dict.fromkeys(Dataset(**r["dataset"]).label for r in records))
    title = (
        f"V0 and V1, {records[0]['num_requests']} requests at once, at most "
        f"{records[0]['engine']['max_num_seqs']} running\n{caption(records[0])}"
    )
    return plot.mode_bars(panels, labels, title=title, forms=(",.0f", ".2f"))


def _mode(text: str) -> str:
    if text.upper() not in MODES:
        raise argparse.ArgumentTypeError(f"{text!r} must be V0 or V1")
    return text.upper()
