"""`vjax convert`: what it writes, what it refuses, and what a failure leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.weights.test_orbax import assert_same_bits
from vjax.weights import convert
from vjax.weights.hub import resolve_model_path

TINY = resolve_model_path("vjax-tiny")
SMALL = ["--engine.max_model_len", "256", "--engine.max_num_seqs=8", "--engine.max_num_batched_tokens", "128"]


def test_help(vjax):
    code, out, _ = vjax("convert", "--help")
    assert code == 0 and out.startswith("usage: vjax convert ")
    assert all(text in out for text in ("MODEL", "OUTPUT", "--overwrite", "Example:", "Exit codes:"))
    assert vjax("convert", "vjax-tiny", "x")[0] == vjax("convert", "vjax-tiny", "x", "--to", "gguf")[0] == 2


def test_there_and_back(vjax, tmp_path):
    code, out, err = vjax("convert", "vjax-tiny", tmp_path / "a" / "orbax", "--to", "orbax")
    assert (code, out) == (0, "")
    assert "wrote LlamaForCausalLM, 7.3 million parameters as orbax (bfloat16, 14.0 MiB), to " in err
    others = {path.name for path in TINY.iterdir()} - {"model.safetensors"}
    assert {path.name for path in (tmp_path / "a" / "orbax").iterdir()} == others | {"vjax_orbax"}
    assert vjax("convert", tmp_path / "a" / "orbax", tmp_path / "back", "--to", "safetensors")[0] == 0
    for path in TINY.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name
    (tmp_path / "new").write_text("")
    assert (tmp_path / "back" / "model.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_the_folder_is_a_model(vjax, tmp_path):
    vjax("convert", "vjax-tiny", tmp_path / "orbax", "--to", "orbax")
    code, out, _ = vjax("models", tmp_path / "orbax", "--json")
    assert code == 0 and json.loads(out)["weights_checked"]
    generated = [
        vjax("generate", "def f(", "--temperature", "0", "--max-tokens", "4", "--model", model, *SMALL)[:2]
        for model in ("vjax-tiny", tmp_path / "orbax")
    ]
    assert generated[0] == generated[1] and generated[0][0] == 0


def test_several_safetensors_files(vjax, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "SHARD_BYTES", 4 << 20)
    assert vjax("convert", "vjax-tiny", tmp_path / "many", "--to", "safetensors")[0] == 0
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert [path.name for path in files] == [f"model-0000{i + 1}-of-00004.safetensors" for i in range(4)]
    found = {name: tensor for path in files for name, tensor in load_file(path).items()}
    expected = load_file(TINY / "model.safetensors")
    assert_same_bits(dict(sorted(found.items())), dict(sorted(expected.items())))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert {*index["weight_map"]} == {*expected}
    # Another model's index does not come along.
    assert vjax("convert", tmp_path / "many", tmp_path / "orbax", "--to", "orbax")[0] == 0
    assert not [*(tmp_path / "orbax").glob("*.safetensors*")]


def test_a_folder_that_is_in_use(vjax, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    assert vjax("convert", "vjax-tiny", output, "--to", "orbax")[0] == 0  # it was empty
    (output / "mine").write_text("")
    code, _, err = vjax("convert", "vjax-tiny", output, "--to", "safetensors")
    assert code == 2 and "is not empty; name another folder, or pass --overwrite" in err
    assert vjax("convert", "vjax-tiny", output, "--to", "safetensors", "--overwrite")[0] == 0
    assert not (output / "mine").exists() and (output / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_what_is_never_overwritten(vjax, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("")
    (tmp_path / "file").write_text("")
    model = shutil.copytree(TINY, tmp_path / "models" / "tiny")
    for source, output, text in [
        ("vjax-tiny", tmp_path / "photos", "holds no config.json"),
        ("vjax-tiny", tmp_path / "file", "is a file"),
        (model, model, "is, or contains, the model"),
        (model, model.parent, "is, or contains, the model"),
    ]:
        code, _, err = vjax("convert", source, output, "--to", "orbax", "--overwrite")
        assert code == 2 and text in err
    assert (tmp_path / "photos" / "a.jpg").exists() and (model / "model.safetensors").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("to", convert.FORMATS)
def test_a_failure_leaves_everything_as_it_was(vjax, tmp_path, monkeypatch, to, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(convert, "save_part" if to == "orbax" else "save_file", fail)
    code, _, err = vjax("convert", "vjax-tiny", tmp_path / "new", "--to", to)
    assert code == (1 if isinstance(error, OSError) else 130) and err
    assert not [*tmp_path.iterdir()]
    old = shutil.copytree(TINY, tmp_path / "old")
    vjax("convert", "vjax-tiny", old, "--to", to, "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert {path.name for path in old.iterdir()} == {path.name for path in TINY.iterdir()}


def test_orbax_says_why_it_cannot_write(vjax, tmp_path, monkeypatch):
    save_part = convert.save_part

    def save_over_a_file(folder: Path, *arguments):
        folder.write_text("")
        save_part(folder, *arguments)

    monkeypatch.setattr(convert, "save_part", save_over_a_file)
    code, _, err = vjax("convert", "vjax-tiny", tmp_path / "new", "--to", "orbax")
    assert code == 1 and "part-00000 cannot be written: " in err
    assert not [*tmp_path.iterdir()]


def test_a_model_that_cannot_be_read(vjax, tmp_path):
    model = shutil.copytree(TINY, tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"")
    code, _, err = vjax("convert", model, tmp_path / "new", "--to", "orbax")
    assert code == 2 and "no intact safetensors file" in err and not (tmp_path / "new").exists()
