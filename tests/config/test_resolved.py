"""The resolved configuration, written and read again."""

from __future__ import annotations

import json

import pytest

from vjax.config import yaml_io
from vjax.config.file import load_run_file
from vjax.config.resolved import identity, to_yaml

BASE = "{engine: {max_num_seqs: 8, gpu_memory_utilization: 1e-1}, sampling: {stop: ['\\n\\n', '1e-3', 'é: #']}}"
RUN = """
extends: base.yaml
engine: {model: some/model, override_generation_config: {top_k: 3}, enforce_eager: true}
sampling: {temperature: 0.5, stop_token_ids: [3], repetition_detection: {max_pattern_size: 4, min_count: 3}}
prompts:
  - "two\\n  lines: # \\u2028 \\U0001F600"
  - {prompt: "'quoted'", cache_salt: '12'}
  - {prompt_token_ids: [1, 2]}
  - {messages: [{role: user, content: "1.0"}]}
output: out.jsonl
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path / "run.yaml"


@pytest.mark.parametrize("overrides", [[], ["--engine.seed", "7", "--sampling.min_p=1e-3", "--prompts", "[x]"]])
def test_the_written_file_is_the_same_run(path, tmp_path, overrides):
    run = load_run_file(path, overrides)
    written = tmp_path / "elsewhere" / "written.yaml"
    written.parent.mkdir()
    written.write_text(to_yaml(run))
    again = load_run_file(written)
    assert (again.sampling, again.prompts, again.output) == (run.sampling, run.prompts, run.output)
    assert identity(again) == identity(run)
    assert again.engine.use_v1 is True and run.engine.use_v1 is None


def test_without_sampling_and_with_a_prompt_file(path, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("a\nb\n")
    path.write_text("prompts: p.txt")
    run = load_run_file(path)
    written = tmp_path / "written.yaml"
    written.write_text(to_yaml(run))
    monkeypatch.chdir("/")
    again = load_run_file(written)
    assert again.sampling is None and again.prompts == ["a", "b"] and identity(again) == identity(run)


def test_sources(path):
    lines = to_yaml(load_run_file(path, ["--engine.seed", "7"])).splitlines()
    base = path.with_name("base.yaml")
    for line in (
        f"  model: some/model  # {path}",
        f"  max_num_seqs: 8  # {base}",
        "  seed: 7  # command line",
        "  block_size: 16  # default",
        f"  temperature: 0.5  # {path}",
        "  max_tokens: 16  # default",
        f"output: out.jsonl  # {path}",
    ):
        assert line in lines, lines
    assert not any("enforce_eager" in line for line in lines)


def test_the_mode_of_the_environment_is_part_of_it(path, monkeypatch):
    run = load_run_file(path)
    before = identity(run)
    monkeypatch.setenv("VJAX_USE_V1", "0")
    assert {name for name, value in identity(run).items() if value != before[name]} == {"engine.use_v1"}
    assert "  use_v1: false  # default" in to_yaml(run).splitlines()


def test_what_changes_the_identity(path, tmp_path):
    before = identity(load_run_file(path))
    assert json.loads(json.dumps(before)) == before

    def changed(*overrides: str) -> set[str]:
        now = identity(load_run_file(path, overrides))
        return {name for name in now if now[name] != before.get(name)}

    assert changed("--output", "other.jsonl") == set()
    assert changed("--sampling.max_tokens", "16") == set()
    assert changed("--engine.max_num_seqs", "9") == {"engine.max_num_seqs"}
    assert changed("--sampling.top_k=4") == {"sampling.top_k"}
    assert changed("--prompts", "[a]") == {"prompts"}


@pytest.mark.parametrize(
    "value", ["1e-3", "null", "", "a\nb", "\u2028\x7f\U0001f600", 1e-10, 1e22, -0.5, True, [["~"], {}]]
)
def test_what_is_dumped_can_be_parsed(value):
    line = yaml_io.dump({"key": value})
    assert "\n" not in line and yaml_io.parse(line, "") == {"key": value}
    assert yaml_io.parse(f"key: {yaml_io.dump(value)}  # comment", "") == {"key": value}
