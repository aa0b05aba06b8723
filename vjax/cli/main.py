"""`vjax <command>`: parses the command line and hands over. Exit codes: 0 done, 1 failed, 2 wrong usage or bad input,
130 interrupted, 141 nobody reads the output any more."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from vjax import __version__
from vjax.cli import bench, chat, collect_env, convert, generate, models, run
from vjax.cli.parser import ArgumentParser
from vjax.errors import VjaxValidationError


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="vjax",
        allow_abbrev=False,
        description="LLM inference in JAX with vLLM's API.",
        epilog="`vjax COMMAND --help` explains a command. Without --model every command uses the bundled vjax-tiny.",
    )
    parser.add_argument("--version", action="version", version=f"vjax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (run, generate, chat, convert, bench, models, collect_env):
        module.add_parser(commands)
    return parser


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes `--section.key VALUE` and `--section.key=VALUE` out of a command line, wherever they stand.

    Returns:
        What is left for argparse, and the overrides. A value may not begin with two dashes; without one the override
        stands alone.
    """
    left: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            return [*left, argument, *rest], overrides
        name, equals, _ = argument.partition("=")
        if not (name.startswith("--") and "." in name):
            left.append(argument)
            continue
        overrides.append(argument)
        if not equals and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return left, overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code.
    """
    arguments, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args = parser.parse_args(arguments)
    if overrides and not getattr(args, "takes_overrides", ()):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    args.overrides = overrides
    try:
        code = args.handler(args)
        sys.stdout.flush()
        return code
    except VjaxValidationError as e:
        print(f"vjax: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Python flushes standard output once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as e:
        print(f"vjax: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vjax: interrupted", file=sys.stderr)
        return 130
