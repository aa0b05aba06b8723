"""The engine on the command line: --model, and --engine.NAME VALUE for every other argument."""

from __future__ import annotations

import argparse
from typing import Any

from vjax.errors import ConfigError

EPILOG = (
    "Engine arguments are given as --engine.NAME VALUE, for example --engine.max_model_len 1024; "
    "`vjax run --schema` describes them all."
)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="vjax-tiny", help="folder, hub id or vjax-tiny (default: %(default)s)")


def engine_arguments(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Keywords of `LLM`, from --model and the overrides.

    Raises:
        ConfigError: An override is not one of the engine's. Its name and value are not checked.
    """
    from vjax.config.layers import merge, override_layer

    document = merge([{"engine": {"model": args.model}}, override_layer(args.overrides).values])
    if unknown := sorted(set(document) - {"engine"}):
        raise ConfigError(
            f"--{unknown[0]}.* is not an override of `{command}`; only --engine.NAME VALUE is, and "
            f"`{command} --help` lists the options."
        )
    return document["engine"]
