"""Where the values of a run file come from: defaults, files that it extends, itself, the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from vjax.config.file import load_run_file
from vjax.config.layers import merge, override_layer
from vjax.errors import ConfigError
from vjax.sampling_params import SamplingParams


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write_file


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as e:
        load_run_file(path, overrides)
    return [line.strip() for line in str(e.value).split("\n")[1:]]


def test_precedence(write):
    """Default < the farthest file < the nearer file < the command line, key by key."""
    write("base/far.yaml", "{engine: {max_num_seqs: 1, block_size: 32, seed: 1}, prompts: [far], output: far.jsonl}")
    write("base/near.yaml", "{extends: far.yaml, engine: {max_num_seqs: 2, seed: 2}, sampling: {n: 2, top_k: 5}}")
    path = write("run.yaml", "{extends: base/near.yaml, engine: {seed: 3}, sampling: {n: 3}, prompts: [a, b]}")
    run = load_run_file(path, ["--sampling.n", "4"])
    engine = run.engine
    assert (engine.block_size, engine.max_num_seqs, engine.seed, engine.dtype) == (32, 2, 3, "auto")
    assert run.sampling == SamplingParams(n=4, top_k=5)
    assert (run.prompts, run.output) == (["a", "b"], Path("far.jsonl"))
    assert [Path(layer.source).name for layer in run.layers] == ["far.yaml", "near.yaml", "run.yaml", "command line"]
    run = load_run_file(path, ["--engine.seed", "4", "--output", "null", "--prompts", "[c]"])
    assert (run.engine.seed, run.output, run.prompts) == (4, None, ["c"])


def test_empty_sections_say_nothing(write):
    write("base.yaml", "{engine: {seed: 1}, sampling: {n: 2}, prompts: [a], output: o.jsonl}")
    run = load_run_file(write("run.yaml", "extends: base.yaml\nengine:\nsampling:\noutput: null"))
    assert (run.engine.seed, run.sampling, run.output) == (1, SamplingParams(n=2), None)


def test_prompt_files_count_from_the_file_that_names_them(write):
    write("base/p.txt", "one\ntwo\n")
    write("base/base.yaml", "prompts: p.txt")
    assert load_run_file(write("run.yaml", "extends: base/base.yaml")).prompts == ["one", "two"]


def test_circles_are_named(write):
    paths = [write(f"{name}.yaml", f"extends: {after}.yaml") for name, after in ("ab", "bc", "cb")]
    with pytest.raises(ConfigError) as e:
        load_run_file(paths[0])
    a, b, c = paths
    assert f"in a circle: {a} -> {b} -> {c} -> {b};" in str(e.value)


def test_problems_name_the_extended_file(write):
    base = write("base.yaml", "{engine: {max_seqs: 1, seed: -1}, sampling: [1], engin: 3}")
    path = write("run.yaml", "{extends: base.yaml, engine: {dtyp: a}, sampling: {n: 1}, prompts: [a]}")
    found = problems(path, "--engine.see", "1")
    assert f"engine.max_seqs: unknown key; did you mean max_num_seqs? (in {base})" in found
    assert "engine.seed=-1 must be an integer in [0, 9223372036854775807] (in " + f"{base})" in found
    assert f"engin: unknown section; did you mean engine? (in {base})" in found
    assert any(line.startswith("sampling: must be a mapping") for line in found)
    assert {"engine.dtyp: unknown key; did you mean dtype?", "engine.see: unknown key; did you mean seed?"} < set(found)
    assert len(found) == 6


def test_merging_does_not_change_the_documents():
    document = {"engine": {"seed": 1}}
    overrides = override_layer(["--engine.seed", "2", "--sampling.n", "3"]).values
    assert merge([document, overrides]) == {"engine": {"seed": 2}, "sampling": {"n": 3}}
    assert document == {"engine": {"seed": 1}}


@pytest.mark.parametrize("argument", ["engine.seed", "--engine.", "--a.b.c", "--", "-x"])
def test_malformed_overrides(argument):
    with pytest.raises(ConfigError, match=r"is not an override; write --section\.key value"):
        override_layer([argument])
