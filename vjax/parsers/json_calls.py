"""Calls written as JSON objects: the formats of Hermes (Qwen 2.5 and 3 use it too) and of Llama 3."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from vjax.parsers.text_input import Reading, TextInput
from vjax.parsers.tool_calls import CallWriter, Malformed, ToolParser

#: What ends a run of ordinary characters in a string; control characters are not JSON there.
_IN_STRING = re.compile(r'["\\\x00-\x1f]')
#: Outside of strings: brackets, quotes, and whatever JSON does not have there.
_OUTSIDE = re.compile(r"[^\s\w:,.+\-]")
_END_OF_SCALAR = re.compile(r"[^\w.+\-]")
_ARGUMENTS = ("arguments", "parameters")


class HermesToolParser(ToolParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them."""

    openers = ("<tool_call>",)
    closer = "</tool_call>"

    def read_call(self, text: TextInput, opener: str, call: CallWriter) -> Reading[None]:
        yield from text.spaces()
        yield from _expect(text, "{")
        yield from _read_members(text, call)


class Llama3JsonToolParser(ToolParser):
    """`{"name": ..., "parameters": {...}}`, after `<|python_tag|>` or bare; several are separated by `;`.

    As the format has no end mark, any JSON object with these two keys is a call.
    """

    openers = ("<|python_tag|>", "{")
    closer = ";"

    def read_call(self, text: TextInput, opener: str, call: CallWriter) -> Reading[None]:
        if opener != "{":
            yield from text.spaces()
            yield from _expect(text, "{")
        yield from _read_members(text, call)


def _read_members(text: TextInput, call: CallWriter) -> Reading[None]:
    """Reads a call's object after its opening brace: a name, arguments (an object), and keys that do not matter."""
    name: str | None = None
    arguments: str | None = None
    while True:
        yield from text.spaces()
        key = yield from _read_string(text)
        yield from text.spaces()
        yield from _expect(text, ":")
        yield from text.spaces()
        if key == "name" and name is None:
            name = yield from _read_string(text)
            if not name:
                raise Malformed
            if arguments is not None:
                call.begin(name)
                call.add_arguments(arguments)
        elif key in _ARGUMENTS and arguments is None:
            if (yield from text.peek()) != "{":
                raise Malformed
            if name is not None:
                call.begin(name)
            arguments = yield from _read_container(text, call.add_arguments if name is not None else _ignore)
        elif key == "name" or key in _ARGUMENTS:
            raise Malformed
        else:
            yield from _read_value(text)
        yield from text.spaces()
        if (yield from text.peek()) != ",":
            break
        text.take(1)
    if name is None or arguments is None:
        raise Malformed
    yield from _expect(text, "}")


def _read_string(text: TextInput) -> Reading[str]:
    """Reads a JSON string: its value."""
    pieces = [(yield from _expect(text, '"'))]
    while (char := (yield from text.copy_until_char(_IN_STRING, pieces.append))) == "\\":
        pieces.append((yield from _read_escape(text)))
    if char != '"':
        raise Malformed
    pieces.append(text.take(1))
    return loads("".join(pieces))


def _read_container(text: TextInput, emit: Callable[[str], object]) -> Reading[str]:
    """Reads an object or array and gives it to `emit` as it arrives: its text, which is valid JSON."""
    pieces: list[str] = []

    def copy(piece: str) -> None:
        pieces.append(piece)
        emit(piece)

    depth, in_string = 0, False
    while True:
        char = yield from text.copy_until_char(_IN_STRING if in_string else _OUTSIDE, copy)
        if in_string and char == "\\":
            copy((yield from _read_escape(text)))
            continue
        if char == '"':
            in_string = not in_string
        elif in_string or char not in ("{", "}", "[", "]"):
            raise Malformed
        else:
            depth += 1 if char in "{[" else -1
        copy(text.take(1))
        if depth == 0:
            break
    whole = "".join(pieces)
    loads(whole)
    return whole


def _read_value(text: TextInput) -> Reading[None]:
    """Reads any JSON value."""
    first = yield from text.peek()
    if first == '"':
        yield from _read_string(text)
    elif first and first in "{[":
        yield from _read_container(text, _ignore)
    else:
        pieces: list[str] = []
        yield from text.copy_until_char(_END_OF_SCALAR, pieces.append)
        loads("".join(pieces))


def _read_escape(text: TextInput) -> Reading[str]:
    """Reads a backslash and what it escapes."""
    if not (yield from text.has(2)):
        raise Malformed
    return text.take(2)


def _expect(text: TextInput, char: str) -> Reading[str]:
    if (yield from text.peek()) != char:
        raise Malformed
    return text.take(1)


def loads(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        Malformed: It is not JSON; NaN and Infinity are not.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as e:
        raise Malformed from e


def _refuse(constant: str) -> None:
    raise Malformed


def _ignore(piece: str) -> None:
    pass
