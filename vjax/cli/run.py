"""`vjax run FILE.yaml`: one config file in, completions out."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from vjax.cli.output import deliver, open_output
from vjax.config.file import RunFile, load_run_file


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        allow_abbrev=False,
        help="run a config file",
        description="Runs the prompts of a YAML file: sections engine, sampling, prompts and output.",
        epilog="Any value can be overridden: vjax run FILE.yaml --sampling.max_tokens 64 --engine.max_num_seqs 8",
    )
    parser.add_argument("file", metavar="FILE.yaml", help="the run file; configs/quickstart.yaml is an example")
    parser.add_argument("--prompts", metavar="FILE", help="a .txt or .jsonl file in place of the file's prompts")
    parser.add_argument("--output", metavar="FILE", help="where the completions go, one JSON object per line")
    parser.add_argument("--json", action="store_true", help="write JSON to standard output too")
    parser.set_defaults(handler=handle, takes_overrides=True)


def handle(args: argparse.Namespace) -> int:
    sections = [f"--{name}={value}" for name in ("prompts", "output") if (value := getattr(args, name)) is not None]
    run = load_run_file(args.file, args.overrides + sections)
    from vjax.llm import LLM

    with open_output(run.output) as stream, LLM.from_engine_args(run.engine) as llm:
        return deliver(generate(llm, run), run.output, stream, as_json=args.json)


def generate(llm: Any, run: RunFile) -> list[Any]:
    """RequestOutputs of the file's prompts, in their order. Conversations go through the chat template."""
    from vjax.text.chat import chat_prompt

    prompts = [
        chat_prompt(llm.get_tokenizer(), p["messages"]) | {"cache_salt": p.get("cache_salt")}
        if isinstance(p, dict) and "messages" in p
        else p
        for p in run.prompts
    ]
    return llm.generate(prompts, run.sampling, use_tqdm=sys.stderr.isatty())
