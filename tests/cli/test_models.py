"""`vjax models` and `vjax collect-env`."""

from __future__ import annotations

import json
import shutil

import pytest

from vjax.cli.collect_env import collect
from vjax.cli.main import main
from vjax.models.registry import MODELS, POOLING_MODELS
from vjax.weights.hub import resolve_model_path


def run(capsys, *arguments: object) -> tuple[int, list[str]]:
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr().out.splitlines()


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled model."""
    return shutil.copytree(resolve_model_path("vjax-tiny"), tmp_path / "model")


def rewrite(folder, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_lists_what_is_supported(capsys):
    code, lines = run(capsys, "models")
    assert code == 0 and [line.split()[0] for line in lines] == [*MODELS, *POOLING_MODELS]
    assert all(len(line.split()) > 1 for line in lines)


def test_facts_of_the_bundled_model(capsys, folder):
    code, (line,) = run(capsys, "models", "vjax-tiny", "--json")
    facts = json.loads(line)
    config = json.loads((folder / "config.json").read_text())
    assert code == 0 and facts["supported"] and facts["weights_checked"]
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert 0 <= stored - facts["weight_bytes"] < 100_000  # the header
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    wanted = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim
    assert facts["kv_bytes_per_token"] == wanted and facts["max_model_len"] == config["max_position_embeddings"]


def test_without_weights_only_the_config_is_read(capsys, folder):
    for path in folder.glob("*.safetensors"):
        path.unlink()
    code, (line,) = run(capsys, "models", folder)
    assert code == 0 and "only config.json was read" in line


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}, "wrong shape"),
        ({"hidden_act": "relu"}, "relu"),
    ],
)
def test_says_why_not(capsys, folder, fields, text):
    rewrite(folder, **fields)
    code, lines = run(capsys, "models", "vjax-tiny", folder)
    assert code == 1 and ": supported (weights checked)" in lines[0]
    assert f"{folder}: not supported." in lines[1] and text in "\n".join(lines[1:])


def test_damaged_weights_are_found(capsys, folder):
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    code, lines = run(capsys, "models", folder, "--json")
    assert code == 1 and "no intact safetensors file" in json.loads(lines[0])["reason"]


def test_unknown_name(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, (line,) = run(capsys, "models", "../nowhere")
    assert code == 1 and "neither a directory that exists nor a hub id" in line


def test_collect_env(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("VJAX_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_1234")
    (tmp_path / "x").write_bytes(b"0" * 2**21)
    code, lines = run(capsys, "collect-env", "--json")
    found = json.loads(lines[0])
    assert code == 0 and "hf_1234" not in lines[0]
    assert found["environment"]["HF_TOKEN"] == "set, not shown"
    assert found["cache"] == {"folder": str(tmp_path), "used": True, "files": 1, "size": "2.0 MiB"}
    assert found["devices"]["0"].startswith("cpu") and found["kernels"]["bfloat16"] == "xla"
    code, lines = run(capsys, "collect-env")
    assert code == 0 and [line for line in lines if not line.startswith(" ")] == [f"{title}:" for title in collect()]
