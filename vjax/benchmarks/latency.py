"""`vjax bench latency`: seconds that one batch takes from its prompts to its last token."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vjax.benchmarks import profile
from vjax.benchmarks.arguments import add_sampling_arguments, natural, positive
from vjax.benchmarks.records import Record, caption
from vjax.config.engine_args import EngineArgs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input-len", type=positive, default=32, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--output-len", type=positive, default=128, help="tokens generated (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=8, help="requests at once (default: %(default)s)")
    parser.add_argument(
        "--num-iters-warmup", type=natural, default=10, help="batches before the measured ones (default: %(default)s)"
    )
    parser.add_argument("--num-iters", type=positive, default=30, help="measured batches (default: %(default)s)")
    parser.add_argument("--seed", type=natural, default=0, help="of the prompts (default: %(default)s)")
    add_sampling_arguments(parser, default_temperature=1.0)
    profile.add_arguments(parser)


def run(args: argparse.Namespace, engine: EngineArgs) -> Iterator[Record]:
    """One record. Every batch starts with an empty prefix cache."""
    from tqdm import tqdm

    from vjax.benchmarks.measure import prepare, timed_generate
    from vjax.benchmarks.records import percentiles, setting
    from vjax.benchmarks.workloads import random_requests
    from vjax.llm import LLM

    if args.profile is not None:
        profile.check(args.profile, args.output_len)
    engine = dataclasses.replace(engine, skip_tokenizer_init=engine.skip_tokenizer_init or args.disable_detokenize)
    with LLM.from_engine_args(engine) as llm:
        requests = random_requests(
            args.batch_size,
            input_len=args.input_len,
            output_len=args.output_len,
            range_ratio=0.0,
            vocab_size=llm.llm_engine.vocab_size,
            seed=args.seed,
        )
        if args.profile is not None:
            profile.check_device()
        prepare(llm, requests)
        hidden = not sys.stderr.isatty()

        def measure(count: int, title: str) -> list[float]:
            return [
                timed_generate(
                    llm,
                    requests,
                    temperature=args.temperature,
                    detokenize=not engine.skip_tokenizer_init,
                    show_progress=False,
                ).seconds
                for _ in tqdm(range(count), desc=title, disable=hidden)
            ]

        measure(args.num_iters_warmup, "Warm-up")
        latencies = measure(args.num_iters, "Batches")
        profiled = {} if args.profile is None else {"profile": profile.profile(llm, requests, args.profile)}
        yield {
            "bench": "latency",
            "input_len": args.input_len,
            "output_len": args.output_len,
            "batch_size": args.batch_size,
            "num_iters_warmup": args.num_iters_warmup,
            "num_iters": args.num_iters,
            "seed": args.seed,
            "temperature": args.temperature,
            "detokenize": not engine.skip_tokenizer_init,
            "avg_latency": sum(latencies) / len(latencies),
            "latencies": latencies,
            "percentiles": percentiles(latencies),
            "num_compilations": llm.llm_engine.num_compilations_while_serving,
            **profiled,
            **setting(engine, llm),
        }


def row(record: Record) -> dict[str, str]:
    """The table's row."""
    per_token = 1e3 * record["avg_latency"] / record["output_len"]
    return {
        "batch": str(record["batch_size"]),
        "input": str(record["input_len"]),
        "output": str(record["output_len"]),
        "mean s": f"{record['avg_latency']:.4f}",
        "p50 s": f"{record['percentiles']['50']:.4f}",
        "p99 s": f"{record['percentiles']['99']:.4f}",
        "mean ms/output token": f"{per_token:.3f}",
    }


def figure(records: Sequence[Record]) -> Figure:
    """Seconds of each batch, with the median and the 99th percentile."""
    from vjax import plot

    [record] = records
    shown = {name: record["percentiles"][name] for name in ("50", "99")}
    title = (
        f"Latency of {record['batch_size']} requests at once, {record['input_len']} tokens in, "
        f"{record['output_len']} out: the closer the batches, the steadier\n{caption(record)}"
    )
    return plot.latencies(record["latencies"], shown, title=title)
