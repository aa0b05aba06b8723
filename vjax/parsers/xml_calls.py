"""Calls written with XML-like tags: the format of Qwen3-Coder and later Qwen models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from vjax.parsers.json_calls import loads
from vjax.parsers.text_input import Reading, TextInput
from vjax.parsers.tool_calls import CallWriter, Malformed, ToolParser

_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_END_OF_NAME = re.compile(r"[>\n<]")
#: JSON schema's names of types, and others that tools use for them.
_TYPES = {
    **dict.fromkeys(("integer", "int", "long"), "integer"),
    **dict.fromkeys(("number", "float", "double"), "number"),
    **dict.fromkeys(("boolean", "bool"), "boolean"),
    **dict.fromkeys(("object", "dict"), "object"),
    **dict.fromkeys(("array", "list"), "array"),
    "null": "null",
}
_CLASSES: dict[str, Any] = {"integer": int, "number": (int, float), "array": list, "object": dict}


class Qwen3CoderToolParser(ToolParser):
    """`<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`, with newlines between.

    The outer tag may be missing. A value loses one newline at each end. Its type comes from the tool's schema; without
    one, and where the value does not have that type, it is a string. Strings are streamed, other values come whole.
    """

    openers = ("<tool_call>", _FUNCTION)
    closer = "</tool_call>"

    def read_call(self, text: TextInput, opener: str, call: CallWriter) -> Reading[None]:
        if opener != _FUNCTION:
            yield from text.spaces()
            yield from _take_tag(text, _FUNCTION)
        name = yield from _read_name(text)
        properties = self._properties(name)
        call.begin(name)
        call.add_arguments("{")
        separator = ""
        while True:
            yield from text.spaces()
            if (yield from _take_tag(text, _PARAMETER, _FUNCTION_END)) == _FUNCTION_END:
                break
            key = yield from _read_name(text)
            call.add_arguments(f"{separator}{_dumps(key)}: ")
            separator = ", "
            types = _types(properties.get(key))
            if types:
                pieces: list[str] = []
                yield from _read_value(text, pieces.append)
                call.add_arguments(_converted("".join(pieces), types))
            else:
                call.add_arguments('"')
                yield from _read_value(text, lambda piece: call.add_arguments(_dumps(piece)[1:-1]))
                call.add_arguments('"')
        call.add_arguments("}")

    def _properties(self, name: str) -> Mapping[str, Any]:
        """Schemas of a function's arguments by name."""
        parameters = self.functions.get(name, {}).get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        return properties if isinstance(properties, Mapping) else {}


def _read_name(text: TextInput) -> Reading[str]:
    """Reads up to and with the ">" of a tag."""
    pieces: list[str] = []
    char = yield from text.copy_until_char(_END_OF_NAME, pieces.append)
    name = "".join(pieces).strip()
    if char != ">" or not name:
        raise Malformed
    text.take(1)
    return name


def _take_tag(text: TextInput, *tags: str) -> Reading[str]:
    tag = yield from text.next_tag(*tags)
    if not tag:
        raise Malformed
    return text.take(len(tag))


def _read_value(text: TextInput, emit: Callable[[str], object]) -> Reading[None]:
    """Reads a value and its end tag, which models leave out at times; one newline at each end is dropped."""
    if (yield from text.peek()) == "\n":
        text.take(1)
    held = ""

    def copy(piece: str) -> None:
        nonlocal held
        piece = held + piece
        held = "\n" if piece.endswith("\n") else ""
        emit(piece.removesuffix("\n"))

    tag = yield from text.copy_until_tag((_PARAMETER_END, _PARAMETER, _FUNCTION_END), copy)
    if not tag:
        raise Malformed
    if tag == _PARAMETER_END:
        text.take(len(tag))


def _types(schema: Any) -> set[str]:
    """Types other than strings that a text of a schema may stand for; none where it is a string in any case."""
    names = _named_types(schema)
    return names & {"null"} if "string" in names else names


def _named_types(schema: Any) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type", ())
    names = {_TYPES.get(str(t).lower(), "string") for t in (named if isinstance(named, (list, tuple)) else (named,))}
    for choices in (schema.get("anyOf"), schema.get("oneOf")):
        for choice in choices if isinstance(choices, (list, tuple)) else ():
            names |= _named_types(choice)
    return names


def _converted(text: str, types: set[str]) -> str:
    """JSON of the value that a text stands for: of one of the types, or the text itself."""
    word = text.strip().lower()
    if word in ("null", "none"):
        return "null"
    if "boolean" in types and word in ("true", "false"):
        return word
    try:
        value = loads(text)
    except Malformed:
        return _dumps(text)
    fits = any(isinstance(value, _CLASSES[name]) for name in types & _CLASSES.keys()) and not isinstance(value, bool)
    return text.strip() if fits else _dumps(text)


def _dumps(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
