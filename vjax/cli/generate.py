"""`vjax generate`: completions of prompts given on the command line or on standard input."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from vjax.errors import ConfigError


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="complete prompts",
        description="Completes each prompt and prints it with its completion.",
        epilog="Engine arguments go after the prompts as --engine.NAME VALUE, for example --engine.max_model_len 1024.",
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="prompts; none: one per line of standard input")
    parser.add_argument("--model", default="vjax-tiny", help="folder, hub id or vjax-tiny (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=None, help="0 is greedy (default: the model's)")
    parser.add_argument("--top-p", type=float, default=None)
    parser.add_argument("--top-k", type=int, default=None)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--stop", nargs="+", default=None, metavar="TEXT", help="texts that end a completion")
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's message to a chat model")
    parser.add_argument("--json", action="store_true", help="one JSON object per completion")
    parser.set_defaults(handler=handle, takes_overrides=True)


def handle(args: argparse.Namespace) -> int:
    from vjax.cli.run import write
    from vjax.config.file import apply_overrides
    from vjax.llm import LLM

    prompts = args.prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ConfigError("There is no prompt: pass prompts as arguments, or one per line on standard input.")
    document = apply_overrides({"engine": {"model": args.model}}, args.overrides)
    if unknown := sorted(set(document) - {"engine"}):
        raise ConfigError(f"--{unknown[0]}.* is not an override of `vjax generate`; only --engine.NAME VALUE is.")
    with LLM(**document["engine"]) as llm:
        params = llm.get_default_sampling_params()
        chosen = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "seed", "stop")}
        fields = {name: value for name, value in chosen.items() if value is not None}
        params = dataclasses.replace(params, max_tokens=args.max_tokens, **fields)
        if args.chat:
            outputs = llm.chat([[{"role": "user", "content": p}] for p in prompts], params)
        else:
            outputs = llm.generate(prompts, params)
        write(sys.stdout, outputs, as_json=args.json)
    return 0
