"""Checks of single values. A check takes a value and returns it converted, or raises `Refused` with what is allowed."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex


class Refused(Exception):
    """A value is outside its domain; the text completes "name=value ..."."""


@dataclass(frozen=True)
class Check:
    """Takes a value and returns it converted, or raises `Refused`."""

    convert: Callable[[Any], Any]
    #: The values of a run file that pass, as JSON schema.
    schema: Mapping[str, Any]

    def __call__(self, value: Any) -> Any:
        return self.convert(value)


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that is most like a misspelt one, or None if none is alike."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return close[0] if close else None


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """A clause that names the nearest valid name, or all of them if none is alike and they are few."""
    valid = list(valid)
    close = nearest(name, valid)
    if close is not None:
        return f"did you mean {close}?"
    return f"valid are {', '.join(sorted(valid))}" if len(valid) <= 12 else "no valid name is like it"


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Refused("must be true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise Refused("must be a non-empty string")
    return value


def _path(value: Any) -> str:
    return _text(os.fspath(value) if isinstance(value, os.PathLike) else value)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise Refused("must be a mapping with strings as keys")
    return dict(value)


def _fraction(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number <= 1:
        raise Refused("must be a number in (0, 1]")
    return number


boolean = Check(_boolean, {"type": "boolean"})
text = Check(_text, {"type": "string", "minLength": 1})
path = Check(_path, text.schema)
mapping = Check(_mapping, {"type": "object"})
#: A number in (0, 1].
fraction = Check(_fraction, {"type": "number", "exclusiveMinimum": 0, "maximum": 1})


def integer(low: int, high: int | None = None) -> Check:
    allowed = f"at least {low}" if high is None else f"in [{low}, {high}]"

    def check(value: Any) -> int:
        try:
            number = None if isinstance(value, bool) else value.__index__()
        except (AttributeError, TypeError):
            number = None
        if number is None or number < low or (high is not None and number > high):
            raise Refused(f"must be an integer {allowed}")
        return number

    return Check(check, {"type": "integer", "minimum": low} | ({} if high is None else {"maximum": high}))


def choice(*allowed: int | str) -> Check:
    def check(value: Any) -> Any:
        for candidate in allowed:
            if not isinstance(value, bool) and isinstance(value, (str, SupportsIndex)) and value == candidate:
                return candidate
        raise Refused(f"must be one of {', '.join(map(str, allowed))}")

    return Check(check, {"enum": list(allowed)})


def optional(check: Check) -> Check:
    """Of a check with "type" in its schema: None passes too."""
    schema = {**check.schema, "type": [check.schema["type"], "null"]}
    return Check(lambda value: None if value is None else check(value), schema)
