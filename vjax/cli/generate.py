"""`vjax generate`: completions of prompts given on the command line or on standard input."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from vjax.cli import chat_options, engine_options
from vjax.cli.output import deliver, open_output
from vjax.errors import ConfigError

#: Options that are fields of SamplingParams, by name.
_SAMPLING = ("n", "temperature", "top_p", "top_k", "seed", "stop")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        allow_abbrev=False,
        help="complete prompts",
        description="Completes each prompt and prints it with its completion.",
        epilog=engine_options.EPILOG,
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="prompts; none: one per line of standard input")
    engine_options.add_model(parser)
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--n", type=int, default=None, help="completions per prompt (default: 1)")
    parser.add_argument("--temperature", type=float, default=None, help="0 is greedy (default: the model's)")
    parser.add_argument("--top-p", type=float, default=None, help="draw from the most probable tokens of this mass")
    parser.add_argument("--top-k", type=int, default=None, help="draw from this many most probable tokens")
    parser.add_argument("--seed", type=int, default=None, help="makes the completions reproducible")
    parser.add_argument(
        "--stop", action="append", default=None, metavar="TEXT", help="ends a completion; may be given more than once"
    )
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's message to a chat model")
    chat_options.add_template(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object per completion")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the JSON objects to a file")
    parser.set_defaults(handler=handle, takes_overrides=("engine",))


def handle(args: argparse.Namespace) -> int:
    from vjax.sampling_params import SamplingParams

    prompts = args.prompts or _read_prompts()
    engine = engine_options.engine_arguments(args, "vjax generate")
    fields = {name: value for name in _SAMPLING if (value := getattr(args, name)) is not None}
    fields["max_tokens"] = args.max_tokens
    if args.chat_template is not None and not args.chat:
        raise ConfigError("--chat-template needs --chat: without it prompts are completed as they are.")
    template = chat_options.read_template(args.chat_template)
    SamplingParams(**fields)  # what is wrong is said before a model is loaded
    from vjax.llm import LLM

    with open_output(args.output) as stream, LLM(**engine) as llm:
        params = dataclasses.replace(llm.get_default_sampling_params(), **fields)
        show = sys.stderr.isatty()
        if args.chat:
            conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
            outputs = llm.chat(conversations, params, chat_template=template, use_tqdm=show)
        else:
            outputs = llm.generate(prompts, params, use_tqdm=show)
        return deliver(outputs, args.output, stream, as_json=args.json)


def _read_prompts() -> list[str]:
    if sys.stdin.isatty():
        print("one prompt per line; Ctrl-D ends the input", file=sys.stderr)
    try:
        prompts = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as e:
        raise ConfigError(f"Standard input is not UTF-8 text ({e}); convert it.") from e
    if not prompts:
        raise ConfigError("There is no prompt: pass prompts as arguments, or one per line on standard input.")
    return prompts
