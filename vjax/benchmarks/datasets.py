"""The flags that choose a workload, under vLLM's names, and the requests that they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vjax.benchmarks.arguments import natural, positive, ratio
from vjax.errors import ConfigError

if TYPE_CHECKING:
    from vjax.benchmarks.workloads import Request
    from vjax.llm import LLM

NAMES = ("random", "sharegpt", "prefix_repetition", "custom")
#: Name -> its options and their defaults; `output_len` belongs to all of them and goes before the dataset's own.
OPTIONS: dict[str, dict[str, Any]] = {
    "random": {"input_len": 1024, "random_output_len": 128, "random_range_ratio": 0.0},
    "sharegpt": {"dataset_path": None, "sharegpt_output_len": None},
    "prefix_repetition": {
        "prefix_repetition_prefix_len": 256,
        "prefix_repetition_suffix_len": 256,
        "prefix_repetition_num_prefixes": 10,
        "prefix_repetition_output_len": 128,
    },
    "custom": {"dataset_path": None, "custom_output_len": 256},
}


@dataclass(frozen=True)
class Dataset:
    """A workload by name, JSON all through; the same model, options and seed give the same requests."""

    name: str
    num_prompts: int
    seed: int
    #: Those of `OPTIONS[name]`, and "output_len".
    options: dict[str, Any]

    @property
    def needs_tokenizer(self) -> bool:
        return self.options.get("dataset_path") is not None

    @property
    def label(self) -> str:
        """What it is, in a few words."""
        o = self.options
        if self.needs_tokenizer:
            return f"{self.name} file"
        if self.name == "random":
            spread = f" ±{o['random_range_ratio']:.0%}" if o["random_range_ratio"] else ""
            return f"random, {o['input_len']} in, {_output_len(self)} out{spread}"
        if self.name == "sharegpt":
            return "ShareGPT-like lengths"
        prefix, suffix = o["prefix_repetition_prefix_len"], o["prefix_repetition_suffix_len"]
        return f"{o['prefix_repetition_num_prefixes']} prefixes, {prefix}+{suffix} in, {_output_len(self)} out"


def add_arguments(parser: argparse.ArgumentParser, defaults: dict[str, Any] | None = None) -> None:
    """The flags but --dataset-name and --num-prompts. `defaults`: as in `chosen`, for the help."""
    default = {name: value for options in OPTIONS.values() for name, value in options.items()} | (defaults or {})
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--dataset-path",
        metavar="FILE",
        help="sharegpt: a JSON list of conversations (without: random ids of ShareGPT-like lengths); custom: "
        "a JSON object per line with prompt and output_tokens",
    )
    group.add_argument("--seed", type=natural, default=0, help="of the workload (default: %(default)s)")
    group.add_argument("--output-len", type=positive, help="tokens to generate per request, whatever the dataset says")
    group.add_argument(
        "--input-len",
        "--random-input-len",
        dest="input_len",
        type=positive,
        help=f"random: prompt length ({default['input_len']})",
    )
    group.add_argument(
        "--random-output-len", type=positive, help=f"random: output length ({default['random_output_len']})"
    )
    group.add_argument(
        "--random-range-ratio",
        type=ratio,
        help="random: lengths are uniform in [len * (1 - ratio), len * (1 + ratio)], ratio in [0, 1) (0: fixed)",
    )
    group.add_argument("--sharegpt-output-len", type=positive, help="sharegpt: output length (the answer's)")
    group.add_argument("--custom-output-len", type=positive, help="custom: for lines without output_tokens (256)")
    for name, meaning in (
        ("prefix_repetition_prefix_len", "tokens of a prefix"),
        ("prefix_repetition_suffix_len", "tokens of a request's own"),
        ("prefix_repetition_num_prefixes", "different prefixes"),
        ("prefix_repetition_output_len", "output length"),
    ):
        group.add_argument(
            f"--{name.replace('_', '-')}", type=positive, help=f"prefix_repetition: {meaning} ({default[name]})"
        )


def chosen(args: argparse.Namespace, names: Sequence[str], defaults: dict[str, Any] | None = None) -> list[Dataset]:
    """The datasets of these names with the flags of a command line.

    Args:
        defaults: Of a benchmark of its own; they go before those of `OPTIONS`.

    Raises:
        ConfigError: A flag belongs to none of the datasets, or one lacks its file.
    """
    known = {option for options in OPTIONS.values() for option in options}
    given = {name: value for name in sorted(known) if (value := getattr(args, name)) is not None}
    for option in given:
        if not any(option in OPTIONS[name] for name in names):
            owners = " or ".join(name for name in NAMES if option in OPTIONS[name])
            flag = "--" + option.replace("_", "-")
            raise ConfigError(
                f"{flag} has no effect with --dataset-name {' '.join(names)}: it belongs to {owners}; leave it out."
            )
    if "custom" in names and args.dataset_path is None:
        raise ConfigError("--dataset-name custom needs a file: pass --dataset-path.")
    merged = (defaults or {}) | given
    return [
        Dataset(
            name,
            args.num_prompts,
            args.seed,
            {option: merged.get(option, default) for option, default in OPTIONS[name].items()}
            | {"output_len": args.output_len},
        )
        for name in names
    ]


def make_requests(dataset: Dataset, llm: LLM) -> list[Request]:
    """The requests, for the vocabulary, context length and tokenizer of an LLM.

    Raises:
        ConfigError: A file cannot be used.
        VjaxValidationError: It needs the tokenizer, and the LLM has none.
    """
    from vjax.benchmarks import dataset_files, workloads

    o, count, seed = dataset.options, dataset.num_prompts, dataset.seed
    max_total_len = llm.llm_engine.config.model.max_model_len
    common: dict[str, Any] = {"vocab_size": llm.llm_engine.vocab_size, "seed": seed}
    match dataset.name:
        case "random":
            return workloads.random_requests(
                count,
                input_len=o["input_len"],
                output_len=_output_len(dataset),
                range_ratio=o["random_range_ratio"],
                **common,
            )
        case "sharegpt" if o["dataset_path"] is None:
            return workloads.sharegpt_like_requests(
                count, output_len=_output_len(dataset), max_total_len=max_total_len, **common
            )
        case "sharegpt":
            return dataset_files.sharegpt_requests(
                o["dataset_path"],
                count,
                output_len=_output_len(dataset),
                max_total_len=max_total_len,
                encode=llm.get_tokenizer().encode,
                seed=seed,
            )
        case "prefix_repetition":
            return workloads.prefix_repetition_requests(
                count,
                num_prefixes=o["prefix_repetition_num_prefixes"],
                prefix_len=o["prefix_repetition_prefix_len"],
                suffix_len=o["prefix_repetition_suffix_len"],
                output_len=_output_len(dataset),
                **common,
            )
        case "custom":
            return dataset_files.custom_requests(
                o["dataset_path"],
                count,
                output_len=o["output_len"],
                default_output_len=o["custom_output_len"],
                encode=llm.get_tokenizer().encode,
            )
    raise AssertionError(dataset.name)


def _output_len(dataset: Dataset) -> Any:
    overriding = dataset.options["output_len"]
    return dataset.options[f"{dataset.name}_output_len"] if overriding is None else overriding
