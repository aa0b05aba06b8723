"""The training text: the source of Python's own standard library, and conversations made from its functions."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_PERCENT = 3
MAX_FUNCTION_CHARS = 3000
SYSTEM_PROMPT = "You are a helpful assistant that writes Python."
INSTRUCTIONS = (
    "Write a function `{name}`: {summary}",
    "Write a Python function `{name}`. {summary}",
    "Implement `{name}`: {summary}",
)

# Character tables, generated text and files that differ from one installation to the next teach nothing.
_EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
_EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")
_EXCLUDED_SUBTREES = ("test/test_lib2to3/data/", "lib2to3/tests/data/")

Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class SourceFile:
    """One source file; `path` is relative to the library's root, `digest` the sha256 of its text."""

    path: str
    text: str
    digest: str

    @property
    def held_out(self) -> bool:
        """Whether the file is kept out of training. Depends on the text alone, so equal files stay on one side."""
        return int(self.digest[:8], 16) % 100 < HELD_OUT_PERCENT


@dataclass(frozen=True)
class Function:
    """A documented function: `header` runs from `def` through the docstring's line; both texts start in column 0."""

    name: str
    summary: str
    header: str
    source: str

    @property
    def digest(self) -> str:
        return text_digest(self.source)


def text_digest(text: str) -> str:
    """The sha256 of the text's UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def standard_library_root() -> Path:
    """The running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def parses(source: str) -> bool:
    """Whether the text is syntactically valid Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def _excluded(relative: Path) -> bool:
    by_part = any(part in _EXCLUDED_FOLDERS or part.startswith(_EXCLUDED_PREFIXES) for part in relative.parts)
    return by_part or relative.as_posix().startswith(_EXCLUDED_SUBTREES)


def read_library(root: Path, keep_every: int = 1) -> list[SourceFile]:
    """Source files below `root` that decode as UTF-8 and parse, without repeats, ordered by digest.

    Args:
        root: The library's folder.
        keep_every: For quick trials: keep one training file in so many, and twice that share of the held-out files.
    """
    files: dict[str, SourceFile] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _excluded(relative):
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if text.strip():
            digest = text_digest(text)
            files.setdefault(digest, SourceFile(relative.as_posix(), text, digest))
    ordered = sorted(files.values(), key=lambda file: file.digest)
    training = [file for file in ordered if not file.held_out][::keep_every]
    held_out = [file for file in ordered if file.held_out][:: (keep_every + 1) // 2]
    return [file for file in (*training, *held_out) if parses(file.text)]


def documented_functions(text: str) -> Iterator[Function]:
    """Functions and methods of a module that have a docstring and a body besides, dedented to column 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
    lines = text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        header_end, end = node.body[0].end_lineno, node.end_lineno
        if not docstring or header_end is None or end is None or node.body[1].lineno <= header_end:
            continue
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : end]) + "\n")
        header = "\n".join(source.split("\n")[: header_end - node.lineno + 1]) + "\n"
        if len(source) <= MAX_FUNCTION_CHARS and source.startswith(("def ", "async def ")) and parses(source):
            yield Function(node.name, docstring.split("\n")[0].strip(), header, source)


def unique_functions(files: Iterable[SourceFile]) -> list[Function]:
    """The documented functions of the files, without repeats, in file order."""
    found: dict[str, Function] = {}
    for file in files:
        for function in documented_functions(file.text):
            found.setdefault(function.source, function)
    return list(found.values())


def conversations(functions: Iterable[Function]) -> list[Conversation]:
    """Requests for a function with the function as the answer: one or two turns, some behind a system turn.

    Every choice is a function of the source's digest, so the result does not depend on a random state.
    """
    result: list[Conversation] = []
    waiting: Conversation = []
    for function in functions:
        choice = int(function.digest[:8], 16)
        request = INSTRUCTIONS[choice % len(INSTRUCTIONS)].format(name=function.name, summary=function.summary)
        turn = [{"role": "user", "content": request}, {"role": "assistant", "content": function.source.rstrip("\n")}]
        if not waiting and (choice >> 8) % 4 == 0:
            waiting = [{"role": "system", "content": SYSTEM_PROMPT}]
        waiting = waiting + turn
        if len(waiting) > 3 or (choice >> 16) % 3 != 0:
            result.append(waiting)
            waiting = []
    return [*result, waiting] if waiting else result
