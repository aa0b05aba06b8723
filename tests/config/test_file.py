from __future__ import annotations

from pathlib import Path

import pytest

from vjax.config import EngineArgs
from vjax.config.file import load_run_file
from vjax.errors import ConfigError
from vjax.sampling_params import SamplingParams

GOOD = """
engine: {model: some/model, max_num_seqs: 8, enforce_eager: true, gpu_memory_utilization: 5e-1}
sampling: {temperature: 0, max_tokens: 64, stop: ["\\n\\n"]}
prompts:
  - Hello
  - {prompt: Hi, cache_salt: s}
  - {messages: [{role: user, content: Hi}]}
  - {prompt_token_ids: [1, 2]}
output: out.jsonl
"""


@pytest.fixture
def write(tmp_path):
    def write_file(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write_file


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as e:
        load_run_file(path, overrides)
    return str(e.value).split("\n")[1:]


def test_a_whole_file(write):
    run = load_run_file(write(GOOD))
    assert run.engine == EngineArgs("some/model", max_num_seqs=8, gpu_memory_utilization=0.5, disable_log_stats=False)
    assert run.sampling == SamplingParams(temperature=0, max_tokens=64, stop=["\n\n"])
    assert run.prompts[0] == "Hello" and run.prompts[1] == {"prompt": "Hi", "cache_salt": "s"}
    assert run.prompts[3] == {"prompt_token_ids": [1, 2]} and run.output == Path("out.jsonl")


def test_the_smallest_file(write):
    run = load_run_file(write("prompts: [a]"))
    assert (run.engine, run.sampling, run.prompts, run.output) == (
        EngineArgs(disable_log_stats=False),
        None,
        ["a"],
        None,
    )


def test_prompt_files_are_found_beside_the_run_file(write, tmp_path):
    (tmp_path / "p.txt").write_text("first\n\n second\r\n")
    assert load_run_file(write("prompts: p.txt")).prompts == ["first", " second"]
    (tmp_path / "p.jsonl").write_text('"one"\n{"prompt": "two"}\n')
    assert load_run_file(write("prompts: p.jsonl")).prompts == ["one", {"prompt": "two"}]


def test_all_problems_come_at_once_with_the_nearest_key(write):
    path = write("""
engin: {model: a}
engine: {max_num_seq: 8, block_size: 8, tensor_parallel_size: 2, enable_prefix_caching: "maybe"}
sampling: {temprature: 0, top_p: 3, max_tokens: "x", prompt_logprob_start: 1}
prompts: [a, 3, {prompts: b}, {prompt: ""}, {messages: [1]}, ""]
output: 3
""")
    with pytest.raises(ConfigError) as e:
        load_run_file(path)
    first, *lines = str(e.value).split("\n")
    assert first == f"{path} has {len(lines)} problems:"
    text = "\n".join(lines)
    for expected in (
        "engin: unknown section; did you mean engine?",
        "engine.max_num_seq: unknown key; did you mean max_num_seqs?",
        "engine.block_size=8 must be one of 16, 32, 64, 128",
        "engine.tensor_parallel_size=2 is not supported",
        "engine.enable_prefix_caching='maybe' must be true or false",
        "sampling.temprature: unknown key; did you mean temperature?",
        "sampling.top_p=3 must be a number in (0.0, 1.0]",
        "sampling.max_tokens='x' must be an integer at least 1",
        "sampling.prompt_logprob_start=1 is not supported yet",
        "prompts[1]: 3 must be a text",
        "prompts[2]: unknown key 'prompts'; did you mean prompt?",
        "prompts[3]: prompt='' must be a non-empty text",
        "prompts[4]: messages=[1] must hold",
        "prompts[5]: the prompt is empty",
        "output: 3 must be the path of a file",
    ):
        assert expected in text, text
    assert len(lines) == 15


def test_fields_of_sampling_that_contradict_each_other(write):
    (line,) = problems(write("{prompts: [a], sampling: {min_tokens: 20}}"))
    assert "sampling.min_tokens=20 must be at most max_tokens=16" in line
    (line,) = problems(write("{prompts: [a], sampling: {n: 2, temperature: 0}}"))
    assert "sampling.n=2 must be 1" in line


def test_overrides_win_and_keep_the_rest(write):
    arguments = ["--engine.max-num-seqs", "4", "--engine.max_num_seqs=2", "--sampling.top_k", "-1"]
    arguments += ["--sampling.temperature=1e-1", "--engine.skip_tokenizer_init", "--engine.revision", "123"]
    arguments += ["--sampling.stop", "7", "--output", "null"]
    run = load_run_file(write(GOOD), arguments)
    assert (run.engine.max_num_seqs, run.engine.model, run.engine.revision) == (2, "some/model", "123")
    assert run.engine.skip_tokenizer_init and run.output is None
    assert run.sampling == SamplingParams(temperature=0.1, max_tokens=64, stop="7", top_k=-1)


def test_overridden_prompts(write, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "q.txt").write_text("from here")
    monkeypatch.chdir(elsewhere)
    assert load_run_file(write(GOOD), ["--prompts", "q.txt"]).prompts == ["from here"]
    assert load_run_file(write(GOOD), ["--prompts", "[one, two]"]).prompts == ["one", "two"]


def test_overrides_with_unknown_keys_are_reported_like_the_files(write):
    (line,) = problems(write(GOOD), "--engine.max_num_sequences", "3")
    assert line.strip() == "engine.max_num_sequences: unknown key; did you mean max_num_seqs?"
