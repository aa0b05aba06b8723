"""The part of JSON schema (draft 7) that the tests' schemas use; any other keyword is an error."""

from __future__ import annotations

import re
from typing import Any

_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "number": (int, float),
    "integer": (int, float),
    "null": type(None),
}
_ANNOTATIONS = {"$schema", "title", "description", "default"}


def accepts(schema: dict[str, Any], value: Any) -> bool:
    return all(_passes(keyword, allowed, value, schema) for keyword, allowed in schema.items())


def _passes(keyword: str, allowed: Any, value: Any, schema: dict[str, Any]) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    match keyword:
        case "type":
            return any(_is(name, value) for name in ([allowed] if isinstance(allowed, str) else allowed))
        case "enum":
            return any(_equal(value, one) for one in allowed)
        case "const":
            return _equal(value, allowed)
        case "minimum":
            return not number or value >= allowed
        case "exclusiveMinimum":
            return not number or value > allowed
        case "maximum":
            return not number or value <= allowed
        case "exclusiveMaximum":
            return not number or value < allowed
        case "maxLength":
            return not isinstance(value, str) or len(value) <= allowed
        case "minLength":
            return not isinstance(value, str) or len(value) >= allowed
        case "pattern":
            return not isinstance(value, str) or re.search(allowed, value) is not None
        case "minItems":
            return not isinstance(value, list) or len(value) >= allowed
        case "maxItems":
            return not isinstance(value, list) or len(value) <= allowed
        case "maxProperties":
            return not isinstance(value, dict) or len(value) <= allowed
        case "patternProperties":
            return not isinstance(value, dict) or all(
                accepts(one, item)
                for pattern, one in allowed.items()
                for name, item in value.items()
                if re.search(pattern, str(name))
            )
        case "items":
            return not isinstance(value, list) or all(accepts(allowed, item) for item in value)
        case "required":
            return not isinstance(value, dict) or set(allowed) <= set(value)
        case "properties":
            return not isinstance(value, dict) or all(accepts(allowed[k], v) for k, v in value.items() if k in allowed)
        case "additionalProperties":
            assert allowed is False
            known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
            return not isinstance(value, dict) or all(
                name in known or any(re.search(pattern, str(name)) for pattern in patterns) for name in value
            )
        case "anyOf":
            return any(accepts(one, value) for one in allowed)
    assert keyword in _ANNOTATIONS, keyword
    return True


def _is(name: str, value: Any) -> bool:
    if isinstance(value, bool) and name != "boolean":
        return False
    if name == "integer" and isinstance(value, float) and not value.is_integer():
        return False
    return isinstance(value, _TYPES[name])


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, bool) == isinstance(b, bool) and a == b
