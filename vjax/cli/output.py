"""Where completions go: text for people, or a JSON object per line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from vjax.errors import ConfigError


class Writer(Protocol):
    def write(self, text: str, /) -> int: ...


def write(stream: Writer, outputs: Iterable[Any], *, as_json: bool) -> None:
    """One JSON object per completion, or prompt and text for people."""
    for output in outputs:
        for completion in output.outputs:
            if as_json:
                line = {"request_id": output.request_id, **record(output, completion)}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            else:
                stream.write(f"--- {output.prompt or output.prompt_token_ids}\n{completion.text}\n")


def record(output: Any, completion: Any) -> dict[str, Any]:
    """What an output file holds of one completion."""
    return {
        "index": completion.index,
        "prompt": output.prompt,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "error": completion.error,
        "num_prompt_tokens": len(output.prompt_token_ids or ()),
        "num_cached_tokens": output.num_cached_tokens,
    }


def deliver(outputs: list[Any], path: Path | None, stream: Writer, *, as_json: bool) -> int:
    """Writes to `stream`, which `open_output(path)` gave, and tells on stderr what else there is to know.

    Returns:
        The exit code: 1 if a completion failed.
    """
    write(stream, outputs, as_json=as_json or path is not None)
    if path is not None:
        print(f"wrote {sum(len(output.outputs) for output in outputs)} completions to {path}", file=sys.stderr)
    failed = [(output, completion) for output in outputs for completion in output.outputs if completion.error]
    for output, completion in failed:
        print(f"vjax: request {output.request_id} failed: {completion.error}", file=sys.stderr)
    return 1 if failed else 0


@contextmanager
def open_output(path: Path | None) -> Iterator[Writer]:
    """The file, or standard output.

    To be entered before the work starts, so that a path that cannot be written is found out at once. What the file
    held is kept until the block writes to it.

    Raises:
        ConfigError: The file cannot be written.
    """
    if path is None:
        yield sys.stdout
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"output={str(path)!r} cannot be written ({e.strerror}); choose another file.") from e
    with file:
        yield _Replacing(file)


class _Replacing:
    """Empties a file at the first write."""

    def __init__(self, file: TextIO):
        self._file = file
        self._is_fresh = False

    def write(self, text: str) -> int:
        if not self._is_fresh:
            self._is_fresh = True
            if self._file.seekable():
                self._file.truncate(0)
        return self._file.write(text)
