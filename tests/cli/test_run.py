"""`vjax run`: runs that are stopped and continued, resolved configurations, and the files in configs/."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vjax.cli.run_output import RUN_DEPENDENT_FIELDS
from vjax.config.file import load_run_file

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NUM_PROMPTS = 48
RUN_FILE = f"""
engine: {{max_model_len: 256, max_num_seqs: 8, max_num_batched_tokens: 128, kv_cache_memory_bytes: 16777216}}
sampling: {{temperature: 0.8, max_tokens: 48}}
prompts: {json.dumps([f"def function_{i}(x):" for i in range(NUM_PROMPTS)])}
"""
#: Engine arguments with which any config runs on the bundled model; the shapes are those of tests/cli/test_cli.py.
SMALL = ["--engine.model", "vjax-tiny", "--engine.max_model_len", "256", "--engine.max_num_seqs", "8"]
SMALL += ["--engine.kv_cache_memory_bytes", str(16 << 20)]


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN_FILE)
    return path


@pytest.fixture
def vjax_run(vjax):
    """Runs `vjax run` in this process: (exit code, stdout, stderr without the log)."""
    return functools.partial(vjax, "run")


def completions(path: Path) -> list[dict[str, object]]:
    """The lines of a file, without what depends on when a request ran."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        for name in RUN_DEPENDENT_FIELDS:
            del line[name]
    return lines


def kill_after(num_lines: int, run_file: Path, output: Path) -> int:
    """Runs a file in another process and kills it with SIGKILL when the output has so many lines.

    Returns:
        The number of lines, the torn one included.
    """
    command = [sys.executable, "-m", "vjax", "run", str(run_file), "--output", str(output)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (output.exists() and output.read_bytes().count(b"\n") >= num_lines):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    return len(output.read_bytes().splitlines())


def test_a_killed_run_continues(vjax_run, run_file, tmp_path):
    """Equal to an undisturbed run, random draws included, in all but the fields that say how this run went."""
    undisturbed, output = tmp_path / "undisturbed.jsonl", tmp_path / "out.jsonl"
    assert vjax_run(run_file, "--output", undisturbed)[0] == 0
    num_lines = kill_after(10, run_file, output)
    assert 10 <= num_lines < NUM_PROMPTS
    with output.open("ab") as file:
        file.write(b'{"prompt_index": 3, "text": "torn')
    code, out, err = vjax_run(run_file, "--output", output)
    assert (code, out) == (0, "")
    first, last = err.splitlines()
    num_done = int(first.split()[0])
    assert num_lines - 1 <= num_done <= num_lines and first.endswith("already; going on from there")
    assert last == f"wrote {NUM_PROMPTS - num_done} completions to {output}"
    assert [line["prompt_index"] for line in completions(output)] == list(range(NUM_PROMPTS))
    assert completions(output) == completions(undisturbed)
    content = output.read_bytes()
    code, out, err = vjax_run(run_file, "--output", output)
    assert (code, out) == (0, "") and err.startswith(f"all of {NUM_PROMPTS} prompts are in {output} already; --over")
    assert output.read_bytes() == content


def test_ctrl_c_says_how_to_go_on(vjax_run, run_file, tmp_path, monkeypatch):
    from vjax.engine.front import BaseLLMEngine

    output = tmp_path / "out.jsonl"
    step = BaseLLMEngine.step

    def interrupted(engine):
        if output.read_bytes():
            raise KeyboardInterrupt
        return step(engine)

    with monkeypatch.context() as patch:
        patch.setattr(BaseLLMEngine, "step", interrupted)
        code, _, err = vjax_run(run_file, "--output", output, "--sampling.max_tokens", "2")
    num_done = len(output.read_text().splitlines())
    assert code == 130 and 0 < num_done < NUM_PROMPTS
    assert f"{num_done} of {NUM_PROMPTS} prompts are in {output}; the same command continues\n" in err
    assert vjax_run(run_file, "--output", output, "--sampling.max_tokens", "2")[0] == 0
    assert len(completions(output)) == NUM_PROMPTS


def test_what_a_line_holds(vjax_run, run_file, tmp_path):
    from vjax import LLM, SamplingParams

    output = tmp_path / "out.jsonl"
    small = ["--sampling.n", "2", "--sampling.max_tokens", "4", "--prompts", "[import os, 'class A:']"]
    assert vjax_run(run_file, "--output", output, *small)[0] == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["prompt_index"], line["index"]) for line in lines] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for line in lines:
        assert 0 < line["seconds_to_first_token"] <= line["seconds"] < 60
        assert line["num_cached_tokens"] == 0 and line["num_prompt_tokens"] > 0
    with LLM.from_engine_args(load_run_file(run_file).engine) as llm:
        params = SamplingParams(n=2, temperature=0.8, max_tokens=4)
        expected = llm.generate(["import os", "class A:"], params, use_tqdm=False)
    assert [(line["prompt"], line["text"], line["token_ids"], line["finish_reason"]) for line in lines] == [
        (o.prompt, c.text, c.token_ids, c.finish_reason) for o in expected for c in o.outputs
    ]


def test_another_config_or_other_prompts_are_refused(vjax_run, run_file, tmp_path):
    output = tmp_path / "out.jsonl"
    arguments = [run_file, "--output", output, "--sampling.max_tokens", "2"]
    assert vjax_run(*arguments, "--prompts", "[a]")[0] == 0
    before = output.read_bytes()
    code, out, err = vjax_run(*arguments, "--prompts", "[b]", "--sampling.top_k", "5")
    assert (code, out) == (2, "") and err.startswith(f"vjax: {output} was begun with another configuration:\n")
    assert "  sampling.top_k: 0 then, 5 now\n" in err and "  prompts: '1 with hash " in err
    assert "pass --overwrite to start afresh" in err and output.read_bytes() == before
    assert vjax_run(*arguments, "--prompts", "[b]", "--overwrite")[0] == 0
    assert json.loads(output.read_text())["prompt"] == "b"


def test_a_prompt_that_does_not_fit(vjax_run, run_file, tmp_path):
    output = tmp_path / "out.jsonl"
    code, _, err = vjax_run(run_file, "--prompts", json.dumps(["a", "x " * 300]), "--output", output)
    assert code == 2 and "vjax: prompts[1]: The prompt (length " in err and output.read_text() == ""


# ---- the resolved configuration and the schema --------------------------------------------------------------------


def test_print_and_save_config(vjax_run, run_file, tmp_path):
    saved, output = tmp_path / "saved.yaml", tmp_path / "out.jsonl"
    code, out, err = vjax_run(run_file, "--print-config", "--engine.seed", "5", "--output", output)
    assert (code, err) == (0, "") and "  seed: 5  # command line\n" in out and not output.exists()
    small = ["--engine.seed", "5", "--prompts", "[a, b]", "--sampling.max_tokens", "2", "--output", output]
    assert vjax_run(run_file, *small, "--save-config", saved)[0] == 0
    content = output.read_bytes()
    code, out, err = vjax_run(saved)
    assert (code, out, output.read_bytes()) == (0, "", content) and "all of 2 prompts are in" in err
    assert vjax_run(saved, "--output", tmp_path / "again.jsonl")[0] == 0
    assert completions(tmp_path / "again.jsonl") == completions(output)


def test_schema(vjax_run):
    code, out, err = vjax_run("--schema")
    assert (code, err) == (0, "") and out == (CONFIGS / "run.schema.json").read_text()


# ---- configs/ -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_configs_run_on_the_bundled_model(vjax_run, name):
    code, out, err = vjax_run(CONFIGS / f"{name}.yaml", *SMALL, "--sampling.max_tokens", "2", "--json")
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt_index"] for line in lines] == list(range(len(lines))) and len(lines) > 1
    assert all(line["error"] is None and 1 <= len(line["token_ids"]) <= 2 for line in lines)
    if name == "prefix-caching":
        assert [line["num_cached_tokens"] > 0 for line in lines] == [False, True, True, False]
