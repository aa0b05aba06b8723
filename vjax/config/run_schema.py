"""The JSON schema of run files, for editors: generated from the same definitions that check a file.

`vjax run --schema > configs/run.schema.json` brings the committed one up to date.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from typing import Any

from vjax.config import vllm_args
from vjax.config.engine_args import CHECKS, EngineArgs
from vjax.config.file import ENGINE_DEFAULTS, SAMPLING_FIELDS
from vjax.sampling_params import (
    MAX_BAD_WORDS,
    MAX_LOGIT_BIASES,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_N,
    MAX_TEMPERATURE,
    MAX_THINKING_TOKEN_BUDGET,
    RepetitionDetectionParams,
    SamplingParams,
)

_TEXT = {"type": "string", "minLength": 1}
_BOOLEAN = {"type": "boolean"}
_COUNT = {"type": "integer", "minimum": 0}
_TOKEN_IDS = {"type": "array", "items": _COUNT}
#: Fields of SamplingParams that work; of the others only the default is accepted.
SAMPLING: dict[str, dict[str, Any]] = {
    "n": {"type": "integer", "minimum": 1, "maximum": MAX_N},
    "temperature": {"type": "number", "minimum": 0, "maximum": MAX_TEMPERATURE},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": -1},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0},
    "logit_bias": {
        "type": ["object", "null"],
        "patternProperties": {"^[0-9]+$": {"type": "number"}},
        "additionalProperties": False,
        "maxProperties": MAX_LOGIT_BIASES,
    },
    "allowed_token_ids": {**_TOKEN_IDS, "type": ["array", "null"], "minItems": 1},
    "bad_words": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": MAX_BAD_WORDS}, {"type": "null"}]},
    "logprobs": {"type": ["integer", "null"], "minimum": -1},
    "prompt_logprobs": {"type": ["integer", "null"], "minimum": -1},
    "logprob_token_ids": {**_TOKEN_IDS, "type": ["array", "null"], "maxItems": MAX_LOGPROB_TOKEN_IDS},
    "flat_logprobs": _BOOLEAN,
    "seed": {"type": ["integer", "null"], "minimum": -(2**63), "maximum": 2**63 - 1},
    "stop": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}, {"type": "null"}]},
    "stop_token_ids": {**_TOKEN_IDS, "type": ["array", "null"]},
    "ignore_eos": _BOOLEAN,
    "max_tokens": {"type": ["integer", "null"], "minimum": 1},
    "min_tokens": {"type": "integer", "minimum": 0},
    "detokenize": _BOOLEAN,
    "skip_special_tokens": _BOOLEAN,
    "spaces_between_special_tokens": _BOOLEAN,
    "include_stop_str_in_output": _BOOLEAN,
    "stream_interval": {"type": ["integer", "null"], "minimum": 1},
    "thinking_token_budget": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_THINKING_TOKEN_BUDGET},
    "extra_args": {"type": ["object", "null"]},
    "skip_reading_prefix_cache": {"type": ["boolean", "null"]},
    "repetition_detection": {
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {f.name: _COUNT for f in dataclasses.fields(RepetitionDetectionParams)},
    },
    "structured_outputs": {
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {
            "json": {"type": ["object", "string", "null"]},
            "regex": _TEXT | {"type": ["string", "null"]},
            "choice": {"type": ["array", "null"], "items": {"type": "string"}, "minItems": 1},
            "grammar": _TEXT | {"type": ["string", "null"]},
            "json_object": {"type": ["boolean", "null"]},
            "structural_tag": {"type": ["object", "string", "null"]},
            "disable_any_whitespace": _BOOLEAN,
            "disable_additional_properties": _BOOLEAN,
            "whitespace_pattern": {"type": ["string", "null"]},
        },
    },
}


def run_schema() -> dict[str, Any]:
    """A file that the schema accepts has no unknown key and no value of a wrong type or out of its domain; what values
    together may be is checked when the file is read."""
    sections = {
        "extends": _TEXT
        | {"description": "A run file, from this file's folder; its values count where this has none."},
        "engine": _section("The engine's arguments, as of vjax.LLM.", _engine()),
        "sampling": _section("Sampling parameters; without the section the model's own.", _sampling()),
        "prompts": {
            "description": "A list, or the path of a .txt (a prompt per line) or .jsonl file, from this file's folder.",
            "anyOf": [
                {"type": "string", "pattern": r"\.(txt|jsonl)$"},
                {"type": "array", "minItems": 1, "items": _prompt()},
            ],
        },
        "output": {
            "description": "A .jsonl file, from the working directory; null is standard output.",
            "type": ["string", "null"],
            "minLength": 1,
        },
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "vjax run file",
        "type": "object",
        "additionalProperties": False,
        "properties": sections,
    }


def schema_text() -> str:
    """The schema as configs/run.schema.json has it."""
    return json.dumps(run_schema(), indent=1) + "\n"


def _section(description: str, properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "description": description,
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": properties,
    }


def _engine() -> dict[str, Any]:
    defaults = {f.name: f.default for f in dataclasses.fields(EngineArgs)} | ENGINE_DEFAULTS
    texts = field_comments(EngineArgs)
    properties = {
        name: {**check.schema, "default": defaults[name], **_description(texts.get(name))}
        for name, check in CHECKS.items()
    }
    for name in sorted(vllm_args.IGNORED):
        properties[name] = {"description": "Accepted without effect."}
    for name, rule in vllm_args.ONLY.items():
        properties[name] = {"enum": list(rule.allowed), "description": f"Nothing else, since {rule.reason}."}
    return properties


def _sampling() -> dict[str, Any]:
    defaults = {f.name: f.default for f in dataclasses.fields(SamplingParams)}
    texts = field_comments(SamplingParams)
    return {
        name: {**SAMPLING[name], "default": defaults[name], **_description(texts.get(name))}
        if name in SAMPLING
        else {"const": defaults[name], "description": "Not supported yet."}
        for name in SAMPLING_FIELDS
    }


def _prompt() -> dict[str, Any]:
    message = {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"type": "string"}},
    }
    contents = {
        "prompt": _TEXT,
        "prompt_token_ids": _TOKEN_IDS | {"minItems": 1},
        "messages": {"type": "array", "minItems": 1, "items": message},
    }
    salt = {"type": ["string", "null"], "minLength": 1, "description": "Only prompts of one salt share cached KV."}
    forms = [
        {
            "type": "object",
            "required": [name],
            "additionalProperties": False,
            "properties": {name: schema, "cache_salt": salt},
        }
        for name, schema in contents.items()
    ]
    return {"anyOf": [_TEXT, *forms]}


def field_comments(of: type) -> dict[str, str]:
    """The `#:` comments above a dataclass's fields, each as one line."""
    found: dict[str, str] = {}
    lines: list[str] = []
    for line in inspect.getsource(of).splitlines():
        if comment := re.fullmatch(r"\s+#: (.*)", line):
            lines.append(comment[1])
        else:
            if lines and (field := re.match(r"    (\w+):", line)):
                found[field[1]] = " ".join(lines)
            lines = []
    return found


def _description(text: str | None) -> dict[str, str]:
    return {} if text is None else {"description": text}
