"""Random JSON schemas whose documents are short, of the keywords that `tests/config/json_schema.py` knows."""

from __future__ import annotations

import random
from typing import Any

_NAMES = ("name", "id", "tags", "size", "items", "é", "a b", "kind", "self", "x-1")
_PATTERNS = ("^[A-Z]{2,4}$", "^[0-9]{3}-[0-9]{2}$", "^(red|green|blue)$", "^[a-z]+_[a-z]{1,5}$")


def random_schema(seed: int) -> dict[str, Any]:
    """An object, or with one in five seeds something else."""
    r = random.Random(seed)
    return _object(r, 2) if r.random() < 0.8 else _schema(r, 2)


def _schema(r: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_string, _number, _enum, _simple]
    if depth:
        kinds += [_object, _array, _any_of]
    return r.choice(kinds)(r, depth - 1 if depth else 0)


def _object(r: random.Random, depth: int) -> dict[str, Any]:
    names = r.sample(_NAMES, r.randint(1, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _schema(r, depth) for name in names},
        "additionalProperties": False,
    }
    required = [name for name in names if r.random() < 0.7]
    if required or r.random() < 0.5:
        schema["required"] = required
    return schema


def _array(r: random.Random, depth: int) -> dict[str, Any]:
    low = r.randint(0, 2)
    return {"type": "array", "items": _schema(r, depth), "minItems": low, "maxItems": low + r.randint(0, 2)}


def _any_of(r: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_schema(r, depth) for _ in range(r.randint(2, 3))]}


def _string(r: random.Random, depth: int) -> dict[str, Any]:
    del depth
    if r.random() < 0.5:
        return {"type": "string", "pattern": r.choice(_PATTERNS), "maxLength": 12}
    low = r.randint(0, 3)
    return {"type": "string", "minLength": low, "maxLength": low + r.randint(0, 8)}


def _number(r: random.Random, depth: int) -> dict[str, Any]:
    del depth
    low = r.randint(-50, 50)
    bounds = r.choice((("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")))
    kind = r.choice(("integer", "number"))
    schema: dict[str, Any] = {"type": kind, bounds[0]: low, bounds[1]: low + r.randint(2, 1000)}
    # A number between bounds may have any number of digits.
    return {"anyOf": [{"enum": [low + 0.5, low + 1]}, {"type": "null"}]} if kind == "number" else schema


def _enum(r: random.Random, depth: int) -> dict[str, Any]:
    del depth
    values: list[Any] = ["on", "off", 3, -1.5, None, True, 'quo"te', "ü"]
    return {"const": r.choice(values)} if r.random() < 0.3 else {"enum": r.sample(values, r.randint(1, 4))}


def _simple(r: random.Random, depth: int) -> dict[str, Any]:
    del depth
    return {"type": r.choice(("boolean", "null", ["boolean", "null"]))}
