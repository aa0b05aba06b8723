"""The script that trains the bundled model: its text, tokenizer, resumption, measurements and export."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import train_tiny_model as script
from tiny_model import corpus, dataset, export, sampling, training
from tiny_model import tokenizer as tiny_tokenizer
from tiny_model.model import TinyConfig, TinyLlama

SMALL = TinyConfig(
    vocab_size=400,
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    intermediate_size=96,
    max_position_embeddings=128,
)
MODULE = '''"""Module {i}."""


def add_{i}(left, right):
    """Return the sum of both, plus {i}.

    A second line.
    """
    if left == {i}:
        return right
    return left + right + {i}


class Pair:
    def swap(self):
        """Exchange the two."""
        self.left, self.right = self.right, self.left
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    (root / "site-packages").mkdir(parents=True)
    (root / "encodings").mkdir()
    for i in range(60):
        (root / f"m{i}.py").write_text(MODULE.format(i=i))
    (root / "again.py").write_text(MODULE.format(i=3))
    (root / "broken.py").write_text("def f(:\n")
    (root / "latin.py").write_bytes(b"x = '\xe9'\n")
    (root / "site-packages" / "other.py").write_text("x = 1\n")
    (root / "encodings" / "table.py").write_text("x = 2\n")
    (root / "_sysconfigdata_here.py").write_text("x = 3\n")
    return root


@pytest.fixture
def small_script(library: Path, monkeypatch: pytest.MonkeyPatch):
    """The script with a model, a text and a run that take seconds."""
    monkeypatch.setattr(script, "TinyConfig", lambda: SMALL)
    monkeypatch.setattr(script, "standard_library_root", lambda: library)
    monkeypatch.setattr(corpus, "HELD_OUT_PERCENT", 20)
    settings = training.TrainSettings(steps=4, batch_size=2, window=32, warmup_steps=1, checkpoint_every=2)
    smoke = dataclasses.replace(script.SMOKE, settings=settings, keep_every=1, new_tokens=4)
    monkeypatch.setattr(script, "SMOKE", smoke)
    return script


def test_reads_the_files_worth_reading_once(library: Path):
    files = corpus.read_library(library)
    names = {file.path for file in files}
    assert len(files) == 60
    assert "again.py" in names and "m3.py" not in names  # equal texts: the first name in order stays
    assert not names & {"broken.py", "latin.py", "site-packages/other.py", "encodings/table.py"}


def test_split_depends_on_the_text_alone(library: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpus, "HELD_OUT_PERCENT", 20)
    before = {file.digest: file.held_out for file in corpus.read_library(library)}
    for path in list(library.glob("m*.py"))[::2]:
        path.rename(library / f"renamed_{path.name}")
    after = {file.digest: file.held_out for file in corpus.read_library(library)}
    assert before == after
    assert 2 <= sum(before.values()) <= 30


def test_functions_are_dedented_and_their_headers_end_with_the_docstring():
    add, swap = sorted(corpus.documented_functions(MODULE.format(i=1)), key=lambda function: function.name)
    assert (add.name, add.summary) == ("add_1", "Return the sum of both, plus 1.")
    assert add.header.endswith('    A second line.\n    """\n') and add.header.startswith("def add_1(left, right):\n")
    assert swap.source.startswith("def swap(self):\n    ") and corpus.parses(swap.source)


def test_tokenizer_round_trip_and_token_shapes():
    texts = [MODULE.format(i=i) for i in range(20)]
    tokenizer = tiny_tokenizer.train_tokenizer(texts, 400)
    text = texts[0] + "\tx = 1234  # é ☃\r\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    for boundary in ("\n", "    ", "        "):  # a prompt may end after a newline or an indentation
        left, right = text.split(boundary, 1)
        joined = tokenizer.encode(left).ids + tokenizer.encode(boundary + right).ids
        assert joined == tokenizer.encode(text).ids
    assert [tokenizer.id_to_token(i) for i in range(5)] == list(tiny_tokenizer.SPECIAL_TOKENS)
    assert len(tokenizer.encode("1234").ids) == 4


def test_chat_template_writes_what_the_model_is_trained_on():
    jinja2 = pytest.importorskip("jinja2")
    chats = corpus.conversations(corpus.documented_functions("\n".join(MODULE.format(i=i) for i in range(30))))
    assert {turn["role"] for chat in chats for turn in chat} == {"system", "user", "assistant"}
    assert any(len(chat) > 3 for chat in chats)
    template = jinja2.Environment().from_string(tiny_tokenizer.CHAT_TEMPLATE)
    for chat in chats:
        rendered = template.render(messages=chat, bos_token="<|endoftext|>")
        assert rendered == "<|endoftext|>" + tiny_tokenizer.render_conversation(chat)
    opened = template.render(messages=chats[0][:-1], bos_token="", add_generation_prompt=True)
    assert opened.endswith("<|end|>\n<|assistant|>\n")


def test_an_epoch_visits_every_window_once():
    settings = training.TrainSettings(batch_size=4, window=10)
    num_tokens = 10 * 22 + 1
    starts = np.concatenate([training.batch_starts(settings, num_tokens, step) for step in range(5)])
    assert len(np.unique(starts)) == 20 and len(np.unique(starts % 10)) == 1
    assert starts.min() >= 0 and starts.max() + 11 <= num_tokens
    assert not np.array_equal(training.batch_starts(settings, num_tokens, 5), starts[:4])
    with pytest.raises(ValueError, match="30 training tokens"):
        training.batch_starts(settings, 30, 0)


@pytest.mark.parametrize("length", [2, 17, 50])
def test_held_out_nll_scores_every_token_once(length: int):
    """With all parameters zero the model is uniform, so every token but the first costs ln(vocab)."""
    model = TinyLlama(SMALL, jnp.dtype(jnp.float32), rngs=nnx.Rngs(0))
    embedding = model.embed_tokens.embedding
    embedding[...] = jnp.zeros_like(embedding[...])
    nll = training.held_out_nll(model, np.arange(length, dtype=np.uint16), window=16, batch_size=3)
    assert nll == pytest.approx((length - 1) * math.log(SMALL.vocab_size), rel=1e-5)


def test_completions_are_cut_where_the_function_ends():
    header = 'def f():\n    """Doc."""\n'
    assert sampling.function_body("    return 1\n\n\ndef g(:\n") == "    return 1\n"
    assert sampling.is_valid(header, "    return 1\n\n\ndef g(:\n")
    assert not sampling.is_valid(header, "    return (1\n")
    assert not sampling.is_valid(header, "\n\nclass A:\n    pass\n")


def test_smoke_run_resumes_exactly_and_reports_what_it_measured(
    small_script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = tmp_path / "data"

    def run(*phases: str, name: str) -> Path:
        work = tmp_path / name
        paths = ["--data", str(data), "--work", str(work), "--out", str(work / "model")]
        with jax.numpy_dtype_promotion("standard"):  # Optax multiplies its int32 step counter by floats
            small_script.main([*phases, "--smoke", *paths])
        return work

    whole = run("prepare", "train", "evaluate", "export", name="whole")
    starts = training.batch_starts

    def interrupted(settings, num_tokens: int, step: int) -> np.ndarray:
        if step == 3:
            raise KeyboardInterrupt
        return starts(settings, num_tokens, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "batch_starts", interrupted)
        run("train", name="parts")
    seen = []
    monkeypatch.setattr(training, "batch_starts", lambda *args: seen.append(args[-1]) or starts(*args))
    parts = run("train", name="parts")
    assert seen == [2, 3]
    first, second = (json.loads((work / "train.json").read_text()) for work in (whole, parts))
    assert first["train_loss"] == second["train_loss"] and first["best_step"] == second["best_step"]
    pair = (export.checkpoint_tensors(small_script._best_model(work)) for work in (whole, parts))
    jax.tree.map(np.testing.assert_array_equal, *pair)

    card = (whole / "model" / "README.md").read_text()
    scores = json.loads((whole / "scores.json").read_text())
    assert f"{scores['held_out_bits_per_byte']:.3f}" in card
    assert f"({scores['valid_completions']} of {scores['completions']})" in card and "{" not in card
    with pytest.raises(ValueError, match="other settings"):
        small_script.main(["train", "--smoke", "--steps", "6", "--data", str(data), "--work", str(whole)])


def test_transformers_reads_the_export_and_computes_the_same_logits(library: Path, tmp_path: Path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = dataset.prepare(library, tmp_path / "data", vocab_size=SMALL.vocab_size, max_length=128)
    model = TinyLlama(SMALL, jnp.dtype(jnp.float32), rngs=nnx.Rngs(0))
    for norm in (model.norm, model.layers[1].input_layernorm):  # ones would hide a norm that is missing or misplaced
        norm.scale[...] = jnp.linspace(0.5, 1.5, SMALL.hidden_size, dtype=jnp.float32)
    export.round_parameters(model)
    exported = tmp_path / "model"
    export.write_model(model, tmp_path / "data", exported, "# card\n")
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    ids = data.train[:100].astype(np.int32)[None]
    reference = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(np.asarray(model(jnp.asarray(ids))), expected, atol=1e-4)
    assert reference.generation_config.eos_token_id == [0, 1]
    tokenizer = AutoTokenizer.from_pretrained(exported)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|endoftext|><|user|>\na<|end|>\n<|assistant|>\n"
    assert tokenizer("a\n    b")["input_ids"] == data.tokenizer.encode("a\n    b").ids


def test_phases_without_their_predecessors_say_what_to_run(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="prepare"):
        script.main(["train", "--data", str(tmp_path / "none"), "--work", str(tmp_path / "work")])
