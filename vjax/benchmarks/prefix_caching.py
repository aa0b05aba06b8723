"""`vjax bench prefix-caching`: the same prompts with and without prefix caching."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vjax.benchmarks.arguments import add_sampling_arguments, length_range, natural, positive
from vjax.benchmarks.records import Record, caption
from vjax.config.engine_args import EngineArgs
from vjax.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-prompts", type=positive, default=64, help="different prompts (default: %(default)s)")
    parser.add_argument("--repeat-count", type=positive, default=2, help="times of each (default: %(default)s)")
    parser.add_argument("--prefix-len", type=natural, default=128, help="tokens that all share (default: %(default)s)")
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument(
        "--input-length-range",
        type=length_range,
        metavar="MIN:MAX",
        default=(192, 256),
        help="tokens of a prompt, its prefix included (default: 192:256)",
    )
    lengths.add_argument("--input-len", type=positive, metavar="N", help="the same as --input-length-range N:N")
    parser.add_argument("--output-len", type=positive, default=10, help="tokens generated (default: %(default)s)")
    parser.add_argument("--sort", action="store_true", help="order by length; otherwise the order is random")
    parser.add_argument("--seed", type=natural, default=0, help="of prompts and order (default: %(default)s)")
    add_sampling_arguments(parser, default_temperature=0.0)


def run(args: argparse.Namespace, engine: EngineArgs) -> Iterator[Record]:
    """A record without and one with the cache, or the one that enable_prefix_caching asks for."""
    if args.input_len is not None:
        args.input_length_range = (args.input_len, args.input_len)
    shortest = args.input_length_range[0]
    if args.prefix_len >= shortest:
        raise ConfigError(
            f"--prefix-len {args.prefix_len} leaves nothing of a prompt of {shortest} tokens; it must be less."
        )
    asked = engine.enable_prefix_caching
    for caching in (False, True) if asked is None else (asked,):
        yield _measure(args, dataclasses.replace(engine, enable_prefix_caching=caching))


def _measure(args: argparse.Namespace, engine: EngineArgs) -> Record:
    from vjax.benchmarks.measure import prepare, timed_generate
    from vjax.benchmarks.records import setting
    from vjax.benchmarks.workloads import repeated, shared_prefix_requests
    from vjax.llm import LLM

    engine = dataclasses.replace(engine, skip_tokenizer_init=engine.skip_tokenizer_init or args.disable_detokenize)
    min_len, max_len = args.input_length_range
    with LLM.from_engine_args(engine) as llm:
        requests = shared_prefix_requests(
            args.num_prompts,
            prefix_len=args.prefix_len,
            min_len=min_len,
            max_len=max_len,
            output_len=args.output_len,
            vocab_size=llm.llm_engine.vocab_size,
            seed=args.seed,
        )
        prepare(llm, requests)
        done = timed_generate(
            llm,
            repeated(requests, args.repeat_count, sort=args.sort, seed=args.seed),
            temperature=args.temperature,
            detokenize=not engine.skip_tokenizer_init,
        )
        return {
            "bench": "prefix-caching",
            "num_prompts": args.num_prompts,
            "repeat_count": args.repeat_count,
            "prefix_len": args.prefix_len,
            "input_length_range": [min_len, max_len],
            "output_len": args.output_len,
            "sort": args.sort,
            "seed": args.seed,
            "temperature": args.temperature,
            "detokenize": not engine.skip_tokenizer_init,
            "elapsed_time": done.seconds,
            "num_requests": done.num_requests,
            "num_prompt_tokens": done.num_prompt_tokens,
            "num_output_tokens": done.num_output_tokens,
            "num_cached_tokens": done.num_cached_tokens,
            "hit_rate": done.num_cached_tokens / done.num_prompt_tokens,
            "requests_per_second": done.num_requests / done.seconds,
            "num_compilations": done.num_compilations,
            **setting(engine, llm),
        }


def row(record: Record) -> dict[str, str]:
    """The table's row."""
    return {
        "prefix caching": "on" if record["engine"]["enable_prefix_caching"] else "off",
        "requests": str(record["num_requests"]),
        "prompt tokens": str(record["num_prompt_tokens"]),
        "cached": f"{record['hit_rate']:.1%}",
        "s": f"{record['elapsed_time']:.3f}",
        "requests/s": f"{record['requests_per_second']:.2f}",
    }


def figure(records: Sequence[Record]) -> Figure:
    """Prompt tokens from the cache and computed, and seconds, without and with prefix caching."""
    from vjax import plot

    cached = [record["num_cached_tokens"] for record in records]
    return plot.prefix_cache(
        [f"caching {'on' if record['engine']['enable_prefix_caching'] else 'off'}" for record in records],
        cached,
        [record["num_prompt_tokens"] - n for record, n in zip(records, cached, strict=True)],
        [record["elapsed_time"] for record in records],
        title=f"Prefix caching: what is cached is not computed, {records[0]['num_requests']} requests\n"
        + caption(records[0]),
        seconds_label="seconds for all requests",
    )
