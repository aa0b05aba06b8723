"""Requests from files: ShareGPT's JSON, and vLLM's "custom" JSON lines."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vjax.benchmarks.sharegpt import is_usual
from vjax.benchmarks.workloads import Request
from vjax.errors import ConfigError

Encode = Callable[[str], list[int]]


def sharegpt_requests(
    path: str | Path, count: int, *, output_len: int | None, max_total_len: int, encode: Encode, seed: int
) -> list[Request]:
    """The first two turns of `count` random conversations; those too short or too long for vLLM's benchmarks are left
    out.

    Args:
        path: A JSON list of {"conversations": [{"value": text}, ...]}.
        output_len: None is the length of the second turn.

    Raises:
        ConfigError: The file cannot be read, has another form or too few usable conversations.
    """
    document = _parse(_read(path), path)
    if not isinstance(document, list):
        raise ConfigError(f"{path} must hold a JSON list of conversations, and holds a {type(document).__name__}.")
    pairs = [pair for entry in document if (pair := _first_turns(entry, path)) is not None]
    random.Random(seed).shuffle(pairs)
    requests: list[Request] = []
    for prompt, answer in pairs:
        if len(requests) == count:
            break
        ids = encode(prompt)
        length = len(encode(answer)) if output_len is None else output_len
        if is_usual(len(ids), length, max_total_len):
            requests.append(Request(ids, length))
    return _enough(requests, count, path)


def custom_requests(
    path: str | Path, count: int, *, output_len: int | None, default_output_len: int, encode: Encode
) -> list[Request]:
    """The first `count` lines of a file.

    Args:
        path: A JSON object {"prompt": text, "output_tokens": number} a line; the number may be missing.
        output_len: Replaces the lines' own numbers.
        default_output_len: For lines without a number.

    Raises:
        ConfigError: The file cannot be read, has another form or too few lines.
    """
    requests: list[Request] = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if len(requests) == count:
            break
        if not line.strip():
            continue
        entry = _parse(line, f"{path}, line {number},")
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        length = entry.get("output_tokens", default_output_len) if isinstance(entry, dict) else None
        if not isinstance(prompt, str) or not prompt:
            raise ConfigError(f"{path}, line {number}, must be a JSON object with a text under 'prompt'.")
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ConfigError(f"{path}, line {number}: output_tokens={length!r} must be an integer at least 1.")
        requests.append(Request(encode(prompt), length if output_len is None else output_len))
    return _enough(requests, count, path)


def _first_turns(entry: Any, path: str | Path) -> tuple[str, str] | None:
    """Two texts, or None for a conversation of fewer turns."""
    try:
        turns = [turn["value"] for turn in entry["conversations"][:2]]
    except (TypeError, KeyError) as e:
        raise ConfigError(
            f"{path}: every entry must be an object {{'conversations': [{{'value': text}}, ...]}}."
        ) from e
    if not all(isinstance(turn, str) for turn in turns):
        raise ConfigError(f"{path}: every 'value' must be a text.")
    return (turns[0], turns[1]) if len(turns) == 2 and all(turns) else None


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--dataset-path {path} cannot be read ({getattr(e, 'strerror', None) or e}).") from e


def _parse(text: str, source: str | Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise ConfigError(f"{source} is not JSON: {e}.") from e


def _enough(requests: list[Request], count: int, path: str | Path) -> list[Request]:
    if len(requests) < count:
        raise ConfigError(f"{path} has {len(requests)} usable entries; pass --num-prompts {len(requests)} or less.")
    return requests
