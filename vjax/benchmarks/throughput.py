"""`vjax bench throughput`: requests and tokens per second when all requests are there at once."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from vjax.benchmarks import datasets
from vjax.benchmarks.arguments import add_sampling_arguments, positive
from vjax.benchmarks.datasets import Dataset
from vjax.benchmarks.records import Record, caption
from vjax.config.engine_args import EngineArgs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset-name", choices=datasets.NAMES, help="default: sharegpt with --dataset-path, else random"
    )
    parser.add_argument("--num-prompts", type=positive, default=1000, help="requests (default: %(default)s)")
    add_sampling_arguments(parser, default_temperature=1.0)
    datasets.add_arguments(parser)


def run(args: argparse.Namespace, engine: EngineArgs) -> Iterator[Record]:
    """One record."""
    name = args.dataset_name or ("random" if args.dataset_path is None else "sharegpt")
    chosen = datasets.chosen(args, [name])
    yield from measure(
        engine,
        chosen,
        temperature=args.temperature,
        detokenize=not args.disable_detokenize,
        record_steps=args.plot is not None,
    )


def measure(
    engine: EngineArgs,
    chosen: Sequence[Dataset],
    *,
    temperature: float,
    detokenize: bool,
    record_steps: bool = False,
) -> Iterator[Record]:
    """A record per dataset, from one engine. The prefix cache is empty at the start of each.

    Args:
        detokenize: False: no text is made, and the tokenizer is loaded only for a file of texts.
        record_steps: The record also holds the `counts` of each step; counting is in the measured time.
    """
    from vjax.benchmarks.measure import prepare, timed_generate
    from vjax.benchmarks.records import setting
    from vjax.llm import LLM

    needs_tokenizer = detokenize or any(dataset.needs_tokenizer for dataset in chosen)
    engine = dataclasses.replace(engine, skip_tokenizer_init=engine.skip_tokenizer_init or not needs_tokenizer)
    detokenize = detokenize and not engine.skip_tokenizer_init
    with LLM.from_engine_args(engine) as llm:
        workloads = [(dataset, datasets.make_requests(dataset, llm)) for dataset in chosen]
        prepare(llm, [request for _, requests in workloads for request in requests])
        for dataset, requests in workloads:
            recording = llm.llm_engine.record_steps(blocks=False) if record_steps else nullcontext()
            with recording as steps:
                done = timed_generate(llm, requests, temperature=temperature, detokenize=detokenize)
            counts = {} if steps is None else {"steps": [step.counts() for step in steps]}
            num_tokens = done.num_prompt_tokens + done.num_output_tokens
            yield {
                "bench": "throughput",
                "dataset": dataclasses.asdict(dataset),
                "temperature": temperature,
                "detokenize": detokenize,
                "elapsed_time": done.seconds,
                "num_requests": done.num_requests,
                "num_prompt_tokens": done.num_prompt_tokens,
                "num_output_tokens": done.num_output_tokens,
                "total_num_tokens": num_tokens,
                "num_cached_tokens": done.num_cached_tokens,
                "requests_per_second": done.num_requests / done.seconds,
                "tokens_per_second": num_tokens / done.seconds,
                "output_tokens_per_second": done.num_output_tokens / done.seconds,
                "mean_first_token_latency": done.mean_first_token_latency,
                "num_compilations": done.num_compilations,
                **counts,
                **setting(engine, llm),
            }


def measure_in_child(engine: dict[str, Any], chosen: list[dict[str, Any]], **options: Any) -> list[Record]:
    """`measure` with arguments from JSON."""
    return list(measure(EngineArgs(**engine), [Dataset(**fields) for fields in chosen], **options))


def row(record: Record) -> dict[str, str]:
    """The table's row."""
    return {
        "dataset": Dataset(**record["dataset"]).label,
        "requests": str(record["num_requests"]),
        "prompt tokens": str(record["num_prompt_tokens"]),
        "output tokens": str(record["num_output_tokens"]),
        "s": f"{record['elapsed_time']:.2f}",
        "requests/s": f"{record['requests_per_second']:.2f}",
        "tokens/s": f"{record['tokens_per_second']:.1f}",
        "output tokens/s": f"{record['output_tokens_per_second']:.1f}",
    }


def figure(records: Sequence[Record]) -> Figure:
    """Tokens and requests per step, of records with steps."""
    from vjax import plot

    [record] = records
    title = (
        f"{record['num_requests']} requests at once, {record['output_tokens_per_second']:,.0f} output tokens/s: "
        f"how full the steps are\n{caption(record)}"
    )
    return plot.step_load({Dataset(**record["dataset"]).label: record["steps"]}, title=title)
