"""The JSON schema says what the reader of run files accepts, and configs/ is valid by both."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.config.json_schema import accepts
from tests.config.malformed import MALFORMED
from vjax.config import EngineArgs, yaml_io
from vjax.config.engine_args import CHECKS
from vjax.config.file import SAMPLING_FIELDS, load_run_file
from vjax.config.run_schema import SAMPLING, field_comments, run_schema, schema_text
from vjax.errors import ConfigError, VjaxValidationError
from vjax.sampling_params import SamplingParams

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(path.name for path in CONFIGS.glob("*.yaml"))
SCHEMA = run_schema()


def test_the_committed_schema_is_up_to_date():
    assert (CONFIGS / "run.schema.json").read_text() == schema_text(), "vjax run --schema > configs/run.schema.json"
    assert json.loads(schema_text()) == SCHEMA


def test_there_is_a_config_for_each_use():
    wanted = "quickstart v0 v1 llama-2-7b-chat llama-3-8b prefix-caching fp8-kv"
    assert {f"{name}.yaml" for name in wanted.split()} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_configs_are_valid(name, monkeypatch):
    monkeypatch.chdir("/")
    text = (CONFIGS / name).read_text()
    assert text.startswith("# yaml-language-server: $schema=run.schema.json\n")
    assert f"vjax run configs/{name}" in text
    assert accepts(SCHEMA, yaml_io.parse(text, name))
    assert load_run_file(CONFIGS / name).prompts


@pytest.mark.parametrize(("text", "_", "is_seen"), MALFORMED, ids=[text for text, _, _ in MALFORMED])
def test_malformed_files(text, _, is_seen):
    assert accepts(SCHEMA, yaml_io.parse(text, "")) is not is_seen


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "{extends: a.yaml, engine: null, sampling: null, output: null, prompts: [a]}",
        "prompts: [a, {prompt: b, cache_salt: s}, {prompt_token_ids: [1]}, {messages: [{role: user, content: c}]}]",
        "prompts: folder/p.jsonl",
        "engine: {max_model_len: null, enforce_eager: true, tensor_parallel_size: 1, dtype: half}",
        "sampling: {stop: [a], seed: null, presence_penalty: 0, logprobs: null}",
    ],
)
def test_good_files(text):
    assert accepts(SCHEMA, yaml_io.parse(text, ""))


CANDIDATES: list[Any] = [None, True, False, -2, -1, 0, 1, 2, 16, 20000, 0.5, 1.5, 2.5, 2**63, "", "a", "auto", "fp8"]
CANDIDATES += [[], [1], ["a"], [""], [-1], {"a": 1}]


@pytest.mark.parametrize("name", CHECKS)
def test_engine_values(name):
    """Schema and check agree on every candidate."""
    schema = SCHEMA["properties"]["engine"]["properties"][name]
    assert accepts(schema, schema["default"])
    for value in CANDIDATES:
        try:
            EngineArgs(**{name: value})
            is_good = True
        except ConfigError:
            is_good = False
        assert accepts(schema, value) is is_good, (name, value)


@pytest.mark.parametrize("name", SAMPLING_FIELDS)
def test_sampling_values(name):
    """A field that becomes supported gets its entry in `run_schema.SAMPLING`."""
    schema = SCHEMA["properties"]["sampling"]["properties"][name]
    for value in CANDIDATES:
        others: dict[str, Any] = {"max_tokens": None, name: value}
        try:
            SamplingParams(**others)
            is_good = True
        except VjaxValidationError as e:
            is_good = False
            assert ("is not supported yet" in str(e)) is (name not in SAMPLING)
        # Of a field that is not supported the reader also takes other values that ask for nothing.
        if name in SAMPLING:
            assert accepts(schema, value) is is_good, (name, value)
        else:
            assert is_good or not accepts(schema, value), (name, value)


def test_descriptions():
    texts = field_comments(EngineArgs)
    assert texts["tokenizer"] == "Directory or hub id; None is the model's own." and "revision" not in texts
    assert texts["max_num_batched_tokens"].endswith("max_model_len without chunked prefill.")
    assert set(texts) <= {f.name for f in dataclasses.fields(EngineArgs)} and len(texts) > 20
