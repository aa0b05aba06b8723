"""The `prompts` of a run file: a list, or the path of a .txt (a prompt per line) or .jsonl file (an item per line)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vjax.config import checks

Prompt = str | dict[str, Any]

#: Exactly one of them makes an item.
_CONTENT_KEYS = ("prompt", "prompt_token_ids", "messages")
_SUFFIXES = (".txt", ".jsonl")
_KEYS = (*_CONTENT_KEYS, "cache_salt")
_FORMS = (
    'a text, {"prompt": text}, {"prompt_token_ids": [id, ...]} or {"messages": [{"role": ..., "content": ...}, ...]}'
)


def is_prompt_file(value: Any) -> bool:
    """Whether a `prompts` value is the path of a file."""
    return isinstance(value, str) and Path(value).suffix in _SUFFIXES


def read_prompts(value: Any, problems: list[str]) -> list[Prompt]:
    """Prompts in order. What is wrong is appended to `problems`; a relative path counts from the working directory."""
    if isinstance(value, str):
        items = _read_file(value, problems)
    elif isinstance(value, list):
        items = [(f"prompts[{i}]", item) for i, item in enumerate(value)]
    else:
        shown = "missing" if value is None else f"{value!r:.60}"
        problems.append(f"prompts: {shown}; it must be a list of prompts or the path of a .txt or .jsonl file")
        return []
    if items == []:
        problems.append("prompts: there is none; add at least one")
    for where, item in items or ():
        if problem := _item_problem(item):
            problems.append(f"{where}: {problem}")
    return [item for _, item in items or ()]


def _read_file(name: str, problems: list[str]) -> list[tuple[str, Any]] | None:
    path = Path(name).expanduser()
    if not is_prompt_file(name):
        problems.append(f"prompts: {name!r} must be the path of a .txt or .jsonl file; write [{name!r}] for one prompt")
        return None
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        problems.append(f"prompts: {path} cannot be read ({getattr(e, 'strerror', None) or e})")
        return None
    numbered = [(f"{path}, line {i}", line.removesuffix("\r")) for i, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".txt":
        return list(numbered)
    items = []
    for where, line in numbered:
        try:
            items.append((where, json.loads(line)))
        except ValueError as e:
            problems.append(f"{where}: not JSON ({e})")
    return items if items or not numbered else None


def _item_problem(item: Any) -> str | None:
    if isinstance(item, str):
        return None if item else "the prompt is empty"
    if not isinstance(item, dict):
        return f"{item!r:.60} must be {_FORMS}"
    for key in item:
        if key not in _KEYS:
            return f"unknown key {key!r}; {checks.did_you_mean(str(key), _KEYS)}"
    present = [key for key in _CONTENT_KEYS if key in item]
    if len(present) != 1:
        return f"has {' and '.join(present) or 'no prompt'}; it must be {_FORMS}"
    salt = item.get("cache_salt")
    if salt is not None and (not isinstance(salt, str) or not salt):
        return f"cache_salt={salt!r:.60} must be a non-empty text; leave it out to share cached prefixes freely"
    return _content_problem(present[0], item[present[0]])


def _content_problem(key: str, content: Any) -> str | None:
    if key == "prompt":
        return None if isinstance(content, str) and content else f"prompt={content!r:.60} must be a non-empty text"
    if not isinstance(content, list) or not content:
        return f"{key}={content!r:.60} must be a non-empty list"
    if key == "prompt_token_ids":
        good = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in content)
        return None if good else f"{key}={content!r:.60} must hold token ids (integers at least 0)"
    good = all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in content)
    return None if good else f'{key}={content!r:.60} must hold {{"role": ..., "content": ...}} items'
