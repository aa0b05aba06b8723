"""The output file of a run: a line as each request finishes, and a run that was stopped goes on where it was.

FILE            one JSON object per completion; in the order of the prompts once the run is complete
FILE.run.json   what the run was begun with (`vjax.config.resolved.identity`), written before the first line and locked
                while a run writes

The two are enough to continue after any kill: a line that was being written has no line feed yet and is dropped, and
so are completions of a prompt that lacks others of it, and those that failed.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from vjax.errors import ConfigError

#: Fields of a line that depend on when its request ran and after which others. A run that was continued differs from an
#: undisturbed one in nothing else, as far as a request's tokens do not depend on its batch (they do not in float32).
RUN_DEPENDENT_FIELDS = ("num_cached_tokens", "seconds_to_first_token", "seconds")

_AFRESH = "pass --overwrite to start afresh, or choose another --output"


class RunOutput:
    """An open output file. See `open_run_output`."""

    def __init__(self, path: Path, file: IO[bytes], lines: dict[int, list[bytes]]):
        self._path = path
        self._file = file
        self._lines = lines
        self._is_sorted = list(lines) == sorted(lines)

    @property
    def done(self) -> frozenset[int]:
        """Indices of the prompts whose completions are in the file."""
        return frozenset(self._lines)

    def write(self, index: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Adds the completions of a prompt and hands them to the operating system."""
        lines = [json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records]
        self._is_sorted = self._is_sorted and index > max(self._lines, default=-1)
        self._lines[index] = lines
        self._file.write(b"".join(lines))
        self._file.flush()

    def finish(self) -> None:
        """Puts the lines in the order of the prompts, all at once."""
        if not self._is_sorted:
            _replace(self._path, [line for index in sorted(self._lines) for line in self._lines[index]])


@contextmanager
def open_run_output(
    path: Path, begun_with: Mapping[str, Any], num_completions: int, *, overwrite: bool
) -> Iterator[RunOutput]:
    """Opens an output file to continue it, or to begin it. What is no file (a pipe, /dev/stdout) just gets the lines.

    Args:
        begun_with: What decides the outputs; that of an earlier run must be the same.
        num_completions: Per prompt.
        overwrite: Begin, whatever the file holds.

    Raises:
        ConfigError: The file cannot be written, belongs to another run, is being written or is not a run's.
    """
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                output = RunOutput(path, stack.enter_context(path.open("wb")), {})
            else:
                output = _open_file(stack, path.resolve(), begun_with, num_completions, overwrite)
        except OSError as e:
            raise ConfigError(f"output={str(path)!r} cannot be written ({e.strerror}); choose another file.") from e
        yield output


def _open_file(
    stack: ExitStack, path: Path, begun_with: Mapping[str, Any], num_completions: int, overwrite: bool
) -> RunOutput:
    if not overwrite:
        _check_is_a_runs(path)
    _begin_or_continue(stack, path, begun_with, overwrite)
    content = path.read_bytes()
    lines = _whole_lines(path, content, num_completions)
    kept = [line for of_prompt in lines.values() for line in of_prompt]
    if b"".join(kept) != content:
        _replace(path, kept)
    return RunOutput(path, stack.enter_context(path.open("ab")), lines)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".run.json")


def _check_is_a_runs(path: Path) -> None:
    has_lines = path.exists() and path.stat().st_size
    if has_lines and not (_sidecar(path).exists() and _sidecar(path).stat().st_size):
        raise ConfigError(
            f"{path} holds something, but {_sidecar(path).name}, which says what a run was begun with, is missing; "
            f"{_AFRESH}."
        )


def _begin_or_continue(stack: ExitStack, path: Path, begun_with: Mapping[str, Any], overwrite: bool) -> None:
    """Locks the sidecar until `stack` is left, and checks or writes it."""
    sidecar = stack.enter_context(_sidecar(path).open("a+", encoding="utf-8"))
    try:
        fcntl.flock(sidecar, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise ConfigError(f"{path} is being written by another run; wait for it, or choose another --output.") from e
    if overwrite or not path.exists() or not path.stat().st_size:
        path.write_bytes(b"")
        sidecar.truncate(0)
        sidecar.write(json.dumps(begun_with, indent=1, ensure_ascii=False) + "\n")
        sidecar.flush()
        os.fsync(sidecar.fileno())
        return
    sidecar.seek(0)
    try:
        before = json.load(sidecar)
    except ValueError as e:
        raise ConfigError(f"{_sidecar(path)} is not JSON ({e}); {_AFRESH}.") from e
    names = list(dict.fromkeys([*before, *begun_with]))
    if changes := [name for name in names if before.get(name) != begun_with.get(name)]:
        shown = "".join(f"\n  {name}: {before.get(name)!r} then, {begun_with.get(name)!r} now" for name in changes)
        raise ConfigError(
            f"{path} was begun with another configuration:{shown}\nTo continue it, run what it was begun with; "
            f"else {_AFRESH}."
        )


def _whole_lines(path: Path, content: bytes, num_completions: int) -> dict[int, list[bytes]]:
    """Lines by prompt, in the order of the file, of the prompts whose completions are all there and did not fail."""
    found: dict[int, list[bytes]] = defaultdict(list)
    failed: set[int] = set()
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            index, error = record["prompt_index"], record["error"]
        except (ValueError, KeyError, TypeError) as e:
            raise ConfigError(f"{path}, line {number} is not a completion; {_AFRESH}.") from e
        found[index].append(line + b"\n")
        if error is not None:
            failed.add(index)
    return {i: lines for i, lines in found.items() if len(lines) == num_completions and i not in failed}


def _replace(path: Path, lines: Sequence[bytes]) -> None:
    """Gives a file other content: whoever looks sees the old one or the new one."""
    written = path.with_name(path.name + ".new")
    with written.open("wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    written.replace(path)
