"""The command `vjax`: what it prints, where, and its exit codes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys

import pytest

from vjax.cli.main import split_overrides
from vjax.errors import EngineStepError

SMALL = ["--engine.max_model_len", "256", "--engine.max_num_seqs=8", "--engine.max_num_batched_tokens", "128"]
SMALL += ["--engine.kv_cache_memory_bytes", str(16 << 20)]
GREEDY = ["--temperature", "0", "--max-tokens", "4"]
RUN_FILE = """
engine: {max_model_len: 256, max_num_seqs: 8, max_num_batched_tokens: 128, kv_cache_memory_bytes: 16777216}
sampling: {temperature: 0, max_tokens: 4}
prompts:
  - "def f("
  - {prompt_token_ids: [292, 301, 12]}
  - {messages: [{role: user, content: Hi}], cache_salt: s}
"""


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN_FILE)
    return path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vjax", *arguments]


# ---- help and usage -----------------------------------------------------------------------------------------------


def test_help_of_the_module():
    done = subprocess.run(command("--help"), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: vjax ")
    assert all(f"\n    {name}" in done.stdout for name in ("run", "generate", "bench"))


def test_version(vjax):
    from vjax import __version__

    assert vjax("--version") == (0, f"vjax {__version__}\n", "")


@pytest.mark.parametrize("name", ["run", "generate", "bench"])
def test_help_of_a_command(vjax, name):
    code, out, _ = vjax(name, "--help")
    assert code == 0 and out.startswith(f"usage: vjax {name} ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["nosuch"], "invalid choice: 'nosuch'"),
        (["generate", "x", "--max_tokens", "3"], "unrecognized arguments: --max_tokens 3; did you mean --max-tokens?"),
        (["generate", "x", "--max-model-len=8"], "--max-model-len=8; did you mean --engine.max_model_len?"),
        (
            ["chat", "--temprature", "1"],
            "vjax chat: error: unrecognized arguments: --temprature 1; did you mean --temp",
        ),
        (["run", "a.yaml", "--max-tokens", "3"], "did you mean --sampling.max_tokens?"),
        (["bench", "latency", "--dtype", "float32"], "did you mean --engine.dtype?"),
        (["generate", "x", "--zzzzzz"], "unrecognized arguments: --zzzzzz"),
        (["generate", "x", "--max-tokens", "many"], "invalid int value: 'many'"),
        (["run"], "required: FILE.yaml"),
        (["run", "a.yaml", "b.yaml"], "unrecognized arguments: b.yaml"),
        (["bench", "host", "--engine.seed", "3"], "unrecognized arguments: --engine.seed 3"),
    ],
)
def test_wrong_usage(vjax, arguments, message):
    code, out, err = vjax(*arguments)
    assert (code, out) == (2, "") and message in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--model", "/no/such"], "Model '/no/such' is neither a directory"),
        (["x", "--model", "no/such-repo"], "Hugging Face hub"),
        (["x", "--max-tokens", "0"], "max_tokens=0 must be an integer at least 1"),
        (["x", "--n", "2", "--temperature", "0"], "n=2 must be 1"),
        (["x", "--engine.max_seqs", "8"], "unknown argument 'max_seqs': did you mean max_num_seqs?"),
        (["x", "--engine.block_size", "8"], "block_size=8 must be one of 16, 32, 64, 128"),
        (["x", "--engine.block_size"], "block_size=True must be one of"),
        (["x", "--sampling.top_k", "8"], "--sampling.* is not an override of `vjax generate`"),
        (["x", "--engine.a.b", "8"], "'--engine.a.b' is not an override"),
        (["x", "--output", "/dev/null/x"], "output='/dev/null/x' cannot be written"),
        (["x", "--model", "./no"], f"nor a hub id of the form owner/name; a relative path counts from {os.getcwd()}."),
        (["x", "--chat-template", "x"], "--chat-template needs --chat"),
        (["x", "--chat", "--chat-template", "/no/such"], "--chat-template /no/such cannot be read (No such file"),
        (["", *SMALL], "The prompt cannot be empty"),
        (["x " * 300, *SMALL], "maximum model length of 256"),
    ],
)
def test_bad_input_is_one_line(vjax, arguments, message):
    code, out, err = vjax("generate", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("vjax: ") and err.count("\n") == 1 and message in err


def test_overrides_may_stand_anywhere():
    left, overrides = split_overrides(
        [
            "generate",
            "--engine.seed",
            "-1",
            "a",
            "--engine.x=a b",
            "--top-k",
            "3",
            "--engine.on",
            "--json",
            "--",
            "--a.b",
        ]
    )
    assert left == ["generate", "a", "--top-k", "3", "--json", "--", "--a.b"]
    assert overrides == ["--engine.seed", "-1", "--engine.x=a b", "--engine.on"]


# ---- generate -----------------------------------------------------------------------------------------------------


def test_generate(vjax):
    code, out, err = vjax("generate", *SMALL, "def f(", "import os", *GREEDY)
    assert (code, err) == (0, "")
    assert out.startswith("--- def f(\n") and "\n--- import os\n" in out


def test_generate_json(vjax):
    code, out, err = vjax("generate", "def f(", "import os", "--json", *GREEDY, *SMALL)
    assert (code, err) == (0, "")
    records = [json.loads(line) for line in out.splitlines()]
    assert [r["prompt"] for r in records] == ["def f(", "import os"]
    first = records[0]
    assert len(first["token_ids"]) == 4 and first["text"] and first["finish_reason"] == "length"
    assert (first["index"], first["num_prompt_tokens"], first["stop_reason"], first["error"]) == (0, 3, None, None)


def test_generate_from_standard_input(vjax, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("def f(\r\n\nimport os"))
    code, out, _ = vjax("generate", "--json", *GREEDY, *SMALL)
    assert code == 0 and [json.loads(line)["prompt"] for line in out.splitlines()] == ["def f(", "import os"]


def test_standard_input_without_prompts(vjax, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert vjax("generate") == (
        2,
        "",
        "vjax: There is no prompt: pass prompts as arguments, or one per line on standard input.\n",
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    code, _, err = vjax("generate")
    assert code == 2 and "not UTF-8" in err


def test_generate_options(vjax):
    chosen = ["--n", "2", "--seed", "3", "--temperature", "1", "--top-p", "0.9", "--top-k", "50", "--stop", "zzz"]
    code, out, _ = vjax("generate", *chosen, "def f(", "--max-tokens", "3", "--json", *SMALL)
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [r["index"] for r in records] == [0, 1]
    assert vjax("generate", *chosen, "def f(", "--max-tokens", "3", "--json", *SMALL)[1] == out
    text = records[0]["text"]
    code, out, _ = vjax("generate", *chosen, "--stop", text[:2], "def f(", "--max-tokens", "3", "--json", *SMALL)
    assert json.loads(out.splitlines()[0])["stop_reason"] == text[:2]


def test_generate_chat(vjax):
    code, out, _ = vjax("generate", "--chat", "Hi", "--json", *GREEDY, *SMALL)
    assert code == 0 and json.loads(out)["prompt"].endswith("Hi<|end|>\n<|assistant|>\n")


def test_generate_to_a_file(vjax, tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    for _ in range(2):  # the second run replaces the first one's
        code, out, err = vjax("generate", "def f(", *GREEDY, *SMALL, "--output", path)
        assert (code, out, err) == (0, "", f"wrote 1 completions to {path}\n")
        assert len(path.read_text().splitlines()) == 1
    code, _, _ = vjax("generate", "x " * 300, *SMALL, "--output", path)
    assert code == 2 and path.read_text(), "a failed run emptied the file"


def test_failed_requests(vjax, monkeypatch):
    from vjax.runner.runner import StepHandle

    def failing(handle):
        raise EngineStepError("planted failure")

    monkeypatch.setattr(StepHandle, "result", failing)
    code, out, err = vjax("generate", "def f(", "--json", *GREEDY, *SMALL)
    assert code == 1 and json.loads(out)["finish_reason"] == "error"
    assert err == "vjax: request 0 failed: planted failure\n"


# ---- run ----------------------------------------------------------------------------------------------------------


def test_run(vjax, run_file):
    code, out, err = vjax("run", run_file)
    assert (code, err) == (0, "")
    first, second, third = out.split("--- ")[1:]
    assert first.splitlines()[1:] == second.splitlines()[1:] and second.startswith("[292, 301, 12]")
    assert "<|user|>\nHi<|end|>" in third


def test_run_with_overrides(vjax, run_file, tmp_path):
    code, out, _ = vjax("run", "--sampling.max_tokens", "2", run_file, "--json", "--engine.max_num_seqs=8")
    assert code == 0 and [len(json.loads(line)["token_ids"]) for line in out.splitlines()] == [2, 2, 2]
    prompts, path = tmp_path / "p.txt", tmp_path / "out.jsonl"
    prompts.write_text("import os\n")
    code, out, err = vjax("run", "--output", path, "--prompts", prompts, run_file)
    assert (code, out, err) == (0, "", f"wrote 1 completions to {path}\n")
    assert json.loads(path.read_text())["prompt"] == "import os"


def test_cache_salt_of_a_conversation(vjax, run_file):
    text = "x" * 200
    item = f"{{messages: [{{role: user, content: {text}}}], cache_salt: %s}}"
    run_file.write_text(RUN_FILE.split("prompts:")[0] + f"prompts: [{item % 's'}, {item % 't'}, {item % 's'}]")
    code, out, err = vjax("run", run_file, "--json")
    assert code == 0, err
    cached = [json.loads(line)["num_cached_tokens"] for line in out.splitlines()]
    assert cached[0] == cached[1] == 0 and cached[2] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine.max_seqs", "3"], "engine.max_seqs: unknown key; did you mean max_num_seqs?"),
        (["--sampling.temprature", "3"], "sampling.temprature: unknown key; did you mean temperature?"),
        (["--engin.seed", "3"], "engin: unknown section; did you mean engine?"),
        (["--sampling.temperature", "hot"], "sampling.temperature='hot' must be a number"),
        (["--prompts", "none.txt"], "none.txt cannot be read"),
        (["--sampling.n", "2"], "sampling.n=2 must be 1"),
    ],
)
def test_run_refuses(vjax, run_file, arguments, message):
    code, out, err = vjax("run", run_file, *arguments)
    assert (code, out) == (2, "") and message in err and err.startswith(f"vjax: {run_file} has a problem:")


def test_run_without_a_file(vjax, tmp_path):
    code, out, err = vjax("run", tmp_path / "no.yaml")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "No such file" in err


# ---- signals and pipes --------------------------------------------------------------------------------------------


def test_ctrl_c():
    arguments = [*SMALL, "--max-tokens", "200", *["def f("] * 400]
    with subprocess.Popen(command("generate", *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if b"engine ready" in line:
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"vjax: interrupted\n")


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "def f(", *GREEDY, *SMALL, "--json"]])
def test_nobody_reads_the_output(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(command(*arguments), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(writer)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr, done.stderr
    assert done.returncode in (0, 141)  # argparse keeps a failed write of the help to itself
