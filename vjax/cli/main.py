"""`vjax <command>`: parses the command line and hands over. Exit codes: 0 done, 1 failed, 2 wrong usage or bad input,
130 interrupted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vjax import __version__
from vjax.cli import bench, generate, run
from vjax.errors import VjaxValidationError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vjax",
        description="LLM inference in JAX with vLLM's API.",
        epilog="`vjax COMMAND --help` explains a command. Without --model every command uses the bundled vjax-tiny.",
    )
    parser.add_argument("--version", action="version", version=f"vjax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (run, generate, bench):
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code.
    """
    args, rest = build_parser().parse_known_args(argv)
    if rest and not getattr(args, "takes_overrides", False):
        build_parser().error(f"unrecognized arguments: {' '.join(rest)}")
    args.overrides = rest
    try:
        return args.handler(args)
    except (VjaxValidationError, FileNotFoundError) as e:
        print(f"vjax: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vjax: interrupted", file=sys.stderr)
        return 130
