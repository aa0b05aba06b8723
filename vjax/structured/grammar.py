"""From what a user asks for to the text of a grammar, in llguidance's language."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from vjax.errors import VjaxValidationError
from vjax.structured_outputs import StructuredOutputsParams

#: Keywords of a JSON schema whose value maps names to schemas, and those whose value is no schema at all.
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_NO_SCHEMAS = ("enum", "const", "default", "examples")


def grammar_text(params: StructuredOutputsParams, special_tokens: Collection[str] = ()) -> str:
    """The grammar of a request.

    Args:
        special_tokens: Those of the tokenizer: a structural tag's trigger may be one.

    Raises:
        VjaxValidationError: It is not written in a language that is known. What it means is checked where it is
            compiled.
    """
    from llguidance import LLMatcher, grammar_from

    try:
        if params.json is not None:
            assert isinstance(params.json, dict)
            schema = closed(params.json) if params.disable_additional_properties else params.json
            return LLMatcher.grammar_from_json_schema(schema, overrides=_json_options(params))  # pyright: ignore[reportArgumentType]
        if params.json_object:
            return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=_json_options(params))  # pyright: ignore[reportArgumentType]
        if params.regex is not None:
            return LLMatcher.grammar_from_regex(params.regex)
        if params.choice is not None:
            return grammar_from("choice", json.dumps(params.choice))
        if params.grammar is not None:
            return grammar_from("grammar", params.grammar)
        return _structural_tag(params, special_tokens)
    except ValueError as e:  # a lone surrogate among them
        raise refused(params, e) from e


def refused(params: StructuredOutputsParams, why: object) -> VjaxValidationError:
    """The error of a grammar that cannot be used."""
    kind = params.kind
    value = getattr(params, kind)
    return VjaxValidationError(
        f"structured_outputs: {kind}={value!r:.200} is refused by llguidance: {str(why).strip()}",
        parameter="structured_outputs",
        value=value,
    )


def closed(schema: Any) -> Any:
    """The schema with additionalProperties false wherever an object has properties and does not say."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {}
    for key, value in schema.items():
        if key in _NAMED_SCHEMAS and isinstance(value, dict):
            result[key] = {name: closed(inner) for name, inner in value.items()}
        else:
            result[key] = value if key in _NO_SCHEMAS else closed(value)
    if "properties" in result or "patternProperties" in result:
        result.setdefault("additionalProperties", False)
    return result


def _json_options(params: StructuredOutputsParams) -> dict[str, Any]:
    options: dict[str, Any] = {"whitespace_flexible": not params.disable_any_whitespace}
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    return options


def _structural_tag(params: StructuredOutputsParams, special_tokens: Collection[str]) -> str:
    from llguidance import LLMatcher, StructTag

    assert isinstance(params.structural_tag, dict)
    triggers = params.structural_tag["triggers"]
    special = [trigger in special_tokens for trigger in triggers]
    tags = []
    for structure in params.structural_tag["structures"]:
        begin, schema = structure["begin"], structure["schema"]
        trigger = next(trigger for trigger in triggers if begin.startswith(trigger))
        schema = closed(schema) if params.disable_additional_properties else schema
        schema = {**schema, "x-guidance": _json_options(params)}
        tags.append(StructTag(trigger=trigger, begin=begin, grammar=schema, end=structure["end"]))
    if any(special) and not all(special):
        raise ValueError(f"of the triggers {triggers} some are special tokens of the model and some are not")
    return LLMatcher.grammar_from_lark(StructTag.to_grammar(tags, assume_special=any(special)))
