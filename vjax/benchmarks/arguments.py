"""Values on a benchmark's command line: bad ones are refused by argparse, with what is allowed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T", int, float)


def positive(text: str) -> int:
    return _number(text, int, lambda n: n >= 1, "an integer at least 1")


def natural(text: str) -> int:
    return _number(text, int, lambda n: n >= 0, "an integer at least 0")


def ratio(text: str) -> float:
    return _number(text, float, lambda x: 0 <= x < 1, "a number in [0, 1)")


def temperature(text: str) -> float:
    return _number(text, float, lambda x: 0 <= x <= 2, "a number in [0, 2]")


def length_range(text: str) -> tuple[int, int]:
    """ "128:256" -> (128, 256)."""
    low, colon, high = text.partition(":")
    try:
        lengths = int(low), int(high) if colon else -1
    except ValueError:
        lengths = 0, -1
    if not 1 <= lengths[0] <= lengths[1]:
        raise argparse.ArgumentTypeError(f"{text!r} must be MIN:MAX with 1 <= MIN <= MAX")
    return lengths


def add_sampling_arguments(parser: argparse.ArgumentParser, *, default_temperature: float) -> None:
    """--temperature and --disable-detokenize."""
    parser.add_argument(
        "--temperature", type=temperature, default=default_temperature, help="0 is greedy (default: %(default)s)"
    )
    parser.add_argument(
        "--disable-detokenize", action="store_true", help="token ids in, token ids out; the tokenizer is not loaded"
    )


def _number(text: str, convert: Callable[[str], T], is_allowed: Callable[[T], bool], allowed: str) -> T:
    try:
        number = convert(text)
        if is_allowed(number):
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be {allowed}")
