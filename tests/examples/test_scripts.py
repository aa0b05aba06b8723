"""The scripts in examples/ that teach run on the bundled model and print what they are meant to show."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from jax.experimental import pallas as pl

from vjax import LLM, SamplingParams
from vjax.models import registry

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
#: Scripts with results of their own, for which there are other tests or which take minutes.
MEASURING = {"kv_cache_accuracy.py", "train_tiny_model.py"}
TEACHING = sorted({path.name for path in EXAMPLES.glob("*.py")} - MEASURING)

Run = Callable[[str], str]


@pytest.fixture
def run(monkeypatch, capsys) -> Run:
    """Runs a script in this process, as its command would; returns what it printed."""
    monkeypatch.setattr(registry, "_registered", {})

    def run(name: str) -> str:
        monkeypatch.setattr(sys, "argv", [name])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_script_is_tested_and_in_the_readme():
    assert [name for name in TEACHING if f"test_{Path(name).stem}" not in globals()] == []
    readme = (ROOT / "README.md").read_text()
    assert [name for name in TEACHING if f"(examples/{name})" not in readme] == []


@pytest.mark.parametrize("name", TEACHING)
def test_a_script_says_how_to_run_it(name):
    tree = ast.parse((EXAMPLES / name).read_text())
    assert f"python examples/{name} [--model" in (ast.get_docstring(tree) or "")
    assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)


def test_offline(run):
    text = run("offline.py")
    counts = re.findall(r"--- (\d+) prompt tokens, then (\d+) generated, ended by (\w+) \((.*)\)\n", text)
    assert len(counts) == 3
    for _, num_generated, reason, stop in counts:
        assert (reason, stop) == (("length", "None") if num_generated == "48" else ("stop", repr("\n\n")))
    for start in ("def read_lines(path):\n", "class Stack:\n    def __init__(self):\n", "class Point:\n"):
        assert f"\n{start}" in text
    samples = re.findall(r"^\d: (.*), the same in a batch: (\w+)$", text, re.MULTILINE)
    assert [same for _, same in samples] == ["True"] * 3 and len({sample for sample, _ in samples}) == 3


def test_chat(run):
    text = run("chat.py")
    (first, none), (second, cached) = (
        map(int, numbers) for numbers in re.findall(r"\[(\d+) prompt tokens, (\d+) of them cached\]", text)
    )
    assert none == 0 and first // 16 * 16 <= cached < second and cached % 16 == 0
    said = text.index("<|system|>\nYou write short Python functions.<|end|>\n<|user|>\nWrite a function `stop`: ")
    answers = re.findall(r"^assistant \(\w+\):\n(.*?)\n\[", text, re.DOTALL | re.MULTILINE)
    assert len(answers) == 2 and all(answers)
    assert f"<|assistant|>\n{answers[0]}<|end|>\n<|user|>\nWrite a function `close`: " in text[said:]
    assert text.rstrip().endswith("<|end|>\n<|assistant|>")


def test_streaming(run):
    text = run("streaming.py")
    steps, _, texts = text.partition("--- ")
    deltas: dict[str, list[tuple[int, str, str]]] = {"stack": [], "area": [], "never": []}
    for line in re.findall(r"^step +\d+  .*$", steps, re.MULTILINE):
        step = int(line.split()[1])
        for name, delta, reason in re.findall(r"(\w+): ('[^']*'|\"[^\"]*\")(?: \((\w+)\))?(?=  |$)", line):
            deltas[name].append((step, ast.literal_eval(delta), reason))
    # A request gets a token in each step after that which it joined, until its tokens are full or it is aborted.
    assert [step for step, _, _ in deltas["stack"]] == list(range(1, 15))
    assert [step for step, _, _ in deltas["area"]] == list(range(5, 11))
    assert [step for step, _, _ in deltas["never"]] == list(range(9, 12))
    assert [deltas[name][-1][2] for name in deltas] == ["length", "length", ""]
    for name, parts in deltas.items():
        assert f"{name}\n{''.join(delta for _, delta, _ in parts)}\n" in texts


def test_prefix_caching(run):
    text = run("prefix_caching.py")
    rows = re.findall(r"^(.+?) +(\d+) tokens, +(\d+) cached  (#*)(\.+) ", text, re.MULTILINE)
    assert [(what, int(cached)) for what, _, cached, _, _ in rows] == [
        ("first prompt", 0),
        ("other end", 80),
        ("other beginning", 0),
        ("same prompt, salted", 0),
        ("same prompt again", 96),
        ("after a reset", 0),
    ]
    for _, num_tokens, cached, found, computed in rows:
        assert len(found) * 16 == int(cached) and len(found + computed) == -(-int(num_tokens) // 16)
    total = sum(int(num_tokens) for _, num_tokens, *_ in rows)
    assert text.endswith(f"\n176 of {total} prompt tokens came from the cache\n")
    assert len(set(re.findall(r"^(?:first|same|after).* -> (.*)$", text, re.MULTILINE))) == 1


def test_run_file(run):
    text = run("run_file.py")
    assert "\nexit codes: 0 0\n" in text
    completions = re.findall(r"^prompt (\d), (?:length|stop): (.*)$", text, re.MULTILINE)
    assert [index for index, _ in completions] == ["0", "1"]
    four = re.search(r"from Python, 4 tokens of the same: (.*)\n", text)
    assert four is not None and ast.literal_eval(four[1])
    assert ast.literal_eval(completions[0][1]).startswith(ast.literal_eval(four[1]))
    assert ".../run.yaml has 2 problems:\n  engine.max_num_seq: unknown key; did you mean max_num_seqs?\n" in text
    assert "  sampling.temperature='hot' must be a number" in text


def test_add_model(run):
    text = run("add_model.py")
    assert text.startswith("Before: Architecture 'SharpForCausalLM' is not supported; supported are LlamaForCausalLM, ")
    assert registry.supported_architectures()[-1] == "SharpForCausalLM"
    # Logits divided by 0.5 are those of temperature 0.5: the same seed has to draw the same tokens.
    with LLM("vjax-tiny") as llm:
        params = SamplingParams(temperature=0.5, seed=0, max_tokens=32)
        completion = llm.generate("class Stack:\n", params, use_tqdm=False)[0].outputs[0]
    assert text.endswith(f"\nAfter:\nclass Stack:\n{completion.text}\n")


def test_add_kernel(run, monkeypatch):
    called = []
    pallas_call = pl.pallas_call
    monkeypatch.setattr(pl, "pallas_call", lambda *args, **kw: called.append(kw["grid"]) or pallas_call(*args, **kw))
    text = run("add_kernel.py")
    error = re.match(r"kernel against its definition: largest difference (\S+)\n", text)
    assert error is not None and float(error[1]) < 2e-6
    assert "\nthe same tokens as before: True\n" in text
    # Traced by the engine, for its rows, and for the comparison, with 5.
    assert len(called) == 2 and called[-1] == (5,)
