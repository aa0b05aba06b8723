"""Orbax checkpoints of the engine's leaves: equal to safetensors bit for bit, and refused when they do not fit."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.weights.test_weight_loading import CONFIG, load, make_model, make_tensors, save_sharded
from vjax import LLM, SamplingParams
from vjax.errors import ModelLoadError
from vjax.weights import convert, orbax_parts
from vjax.weights.convert import convert_model
from vjax.weights.hub import ORBAX_FOLDER, resolve_model_path
from vjax.weights.inspection import inspect_model
from vjax.weights.kv_scales import read_kv_scales
from vjax.weights.manifest import LAYOUT_VERSION, MANIFEST_FILE, stored_format

SMALL = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 128, "kv_cache_memory_bytes": 16 << 20}


def random_bits(tensors: dict[str, np.ndarray], dtypes: Sequence) -> dict[str, np.ndarray]:
    """The tensors with random finite values, subnormal ones too, of the dtypes in turn."""
    rng = np.random.default_rng(1)
    found = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        dtype = np.dtype(dtypes[i % len(dtypes)])
        bits = rng.integers(0, 2 ** (8 * dtype.itemsize), tensor.shape, dtype=f"u{dtype.itemsize}").view(dtype)
        with np.errstate(invalid="ignore"):
            found[name] = np.where(np.isfinite(bits), bits, np.ones_like(bits))
    return found


def make_folder(path: Path, dtypes: Sequence = (ml_dtypes.bfloat16,), **config) -> Path:
    """A checkpoint of three files."""
    path.mkdir()
    tensors = random_bits(make_tensors(make_model(**config)), dtypes)
    save_sharded(path, tensors)
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return path


@pytest.fixture
def folders(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A checkpoint as safetensors, and in several parts as Orbax."""
    monkeypatch.setattr(convert, "PART_BYTES", 500)
    source = make_folder(tmp_path / "source")
    convert_model(source, tmp_path / "orbax", "orbax")
    return source, tmp_path / "orbax"


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, leaf in expected.items():
        assert found[name].dtype == leaf.dtype, name
        np.testing.assert_array_equal(found[name].view(f"u{leaf.itemsize}"), leaf.view(f"u{leaf.itemsize}"), name)


def edit_manifest(folder: Path, **fields) -> None:
    path = folder / ORBAX_FOLDER / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ---- equal to safetensors -----------------------------------------------------------------------------------------

STORED = {
    "bfloat16": [ml_dtypes.bfloat16],
    "float16": [np.float16],
    "float32": [np.float32],
    "mixed": [np.float32, ml_dtypes.bfloat16, np.float16],
}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.filterwarnings("ignore:.* encountered in cast")
def test_bitwise_equal_to_safetensors_of_several_files(tmp_path, stored):
    source = make_folder(tmp_path / "source", STORED[stored])
    convert_model(source, tmp_path / "orbax", "orbax")
    for wanted in (jnp.float32, jnp.bfloat16, jnp.float16):
        assert_same_bits(load(make_model(wanted), tmp_path / "orbax"), load(make_model(wanted), source))


def test_in_parts_of_a_bounded_size(folders):
    source, orbax = folders
    assert len([*(orbax / ORBAX_FOLDER).glob("part-*")]) > 5
    assert_same_bits(load(make_model(), orbax), load(make_model(), source))


def test_the_bundled_model_gives_the_same_tokens(tmp_path):
    convert_model(resolve_model_path("vjax-tiny"), tmp_path / "orbax", "orbax")
    found = []
    for model in ("vjax-tiny", str(tmp_path / "orbax")):
        with LLM(model, **SMALL) as llm:
            params = SamplingParams(temperature=0, max_tokens=24)
            outputs = llm.generate(["def f(", "import os\n"], params, use_tqdm=False)
            found.append([output.outputs[0].token_ids for output in outputs])
    assert found[0] == found[1]


def test_two_devices_read_their_shares(folders):
    source, orbax = folders
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-W", "error", "-m", "tests.weights.sharded_check", str(source), str(orbax)]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_chunks_follow_the_split_axes(monkeypatch):
    monkeypatch.setattr(orbax_parts, "CHUNK_BYTES", 64)
    few_heads = orbax_parts._save_args(jnp.zeros((8, 4, 6, 4)), ("embed", "kv_heads", "heads_per_kv", "head_dim"))
    assert (few_heads.chunk_byte_size, few_heads.shard_axes) == (64, (1,))
    assert orbax_parts._save_args(jnp.zeros((128, 8)), ("mlp", "embed")).shard_axes == ()


def test_scales_of_an_fp8_cache(tmp_path):
    model = make_model()
    source = tmp_path / "source"
    source.mkdir()
    name = "model.layers.{}.self_attn.attn.{}_scale"
    scales = {name.format(0, "k"): np.array([0.25, 0.5], np.float32), name.format(1, "v"): np.array([4], np.float32)}
    save_file({**make_tensors(model), **scales}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(CONFIG))
    expected = read_kv_scales(source, model.arch)
    for to, folder in (("orbax", source), ("safetensors", tmp_path / "orbax")):
        convert_model(folder, tmp_path / to, to)
        found = read_kv_scales(tmp_path / to, model.arch)
        assert expected is not None and found is not None
        assert found["k_scale"].tolist() == expected["k_scale"].tolist() == [[0.25, 0.5], [1, 1]]
        assert found["v_scale"].tolist() == expected["v_scale"].tolist() == [[1, 1], [4, 4]]
    assert read_kv_scales(tmp_path / "nowhere", model.arch, "dummy") is None


# ---- which format is read -----------------------------------------------------------------------------------------


def test_auto_prefers_safetensors(folders):
    source, orbax = folders
    assert (stored_format(source), stored_format(orbax)) == ("safetensors", "orbax")
    expected = load(make_model(), source)
    for path in source.glob("model*"):
        shutil.copy(path, orbax)
    assert stored_format(orbax) == "safetensors"
    assert_same_bits(load(make_model(), orbax, load_format="orbax"), expected)


def test_a_format_that_is_not_there(folders):
    source, orbax = folders
    with pytest.raises(ModelLoadError, match=r"has no Orbax checkpoint of vjax .*vjax convert .*--to orbax"):
        load(make_model(), source, load_format="orbax")
    with pytest.raises(ModelLoadError, match="has no weights"):
        load(make_model(), orbax, load_format="safetensors")


# ---- what does not fit --------------------------------------------------------------------------------------------


def test_another_layout_version(folders):
    edit_manifest(folders[1], layout_version=LAYOUT_VERSION + 1)
    with pytest.raises(ModelLoadError, match=r"layout version 2, this vjax reads version 1\. .*vjax convert"):
        load(make_model(), folders[1])


def test_another_architecture(folders):
    edit_manifest(folders[1], architecture="LlamaForCausalLM")
    with pytest.raises(ModelLoadError, match=r"is of LlamaForCausalLM, its config\.json says Qwen2ForCausalLM"):
        load(make_model(), folders[1])


def test_all_problems_are_reported_together(folders):
    with pytest.raises(ModelLoadError) as error:
        load(make_model(num_hidden_layers=3, tie_word_embeddings=True, intermediate_size=16), folders[1])
    text = str(error.value)
    assert str(folders[1]) in text and "4 missing leaves:\n  layers.2." in text
    assert "1 unexpected leaves:\n  lm_head" in text
    assert "layers.0.mlp.down: [12, 8] in the checkpoint, [16, 8] from config.json" in text
    with pytest.raises(ModelLoadError, match="unexpected leaves"):
        (folders[1] / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": True}))
        inspect_model(folders[1])


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"layout_version": 1, "leaves": {"a": 1}}'])
def test_a_damaged_manifest(folders, content):
    (folders[1] / ORBAX_FOLDER / MANIFEST_FILE).write_text(content)
    with pytest.raises(ModelLoadError, match=r"manifest\.json cannot be read: .*vjax convert"):
        load(make_model(), folders[1])


def test_files_that_are_missing_or_cut(folders):
    _, orbax = folders
    paths = sorted(path for path in (orbax / ORBAX_FOLDER).glob("part-00001/**/*") if path.is_file())
    for path in paths:
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(ModelLoadError, match=rf"1 of \d+ files are missing .*{path.name}\)\. Copy or download"):
            load(make_model(), orbax)
        path.write_bytes(content[:-1])
        with pytest.raises(ModelLoadError, match=path.name):
            inspect_model(orbax)
        path.write_bytes(content)
    shutil.rmtree(orbax / ORBAX_FOLDER / "part-00001")
    with pytest.raises(ModelLoadError, match=rf"{len(paths)} of \d+ files are missing .*, \.\.\.\)"):
        load(make_model(), orbax)


def test_what_orbax_cannot_read(tmp_path):
    convert_model(make_folder(tmp_path / "source"), tmp_path / "orbax", "orbax")
    for path in (tmp_path / "orbax" / ORBAX_FOLDER).rglob("manifest.ocdbt"):
        path.write_bytes(bytes(path.stat().st_size))
    # In a process of its own: TensorStore goes on calling an event loop that Orbax has closed, and its threads write of
    # that to stderr in the middle of what others write.
    code = """
import sys
from tests.weights.test_weight_loading import *
try:
    load(make_model(), Path(sys.argv[1]))
except ModelLoadError as error:
    print(error)
"""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", code, str(tmp_path / "orbax")]
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert re.match(r".*part-00000 cannot be restored: .* It may be damaged; copy", run.stdout), run.stderr


#: sha256 of the leaves of the tensors that `make_tensors` makes.
LAYOUTS = {1: "e1aeda4c61b0adaaf2afef8a966b5b645b907bcaf4dc7ddce19a1f2a3433dc2f"}


def test_the_layout_version_changes_with_the_layout(tmp_path):
    """Checkpoints outlive the code: raise LAYOUT_VERSION and add a line to LAYOUTS when this fails."""
    model = make_model()
    save_file(make_tensors(model), tmp_path / "model.safetensors")
    digest = hashlib.sha256()
    for name, leaf in load(model, tmp_path).items():
        digest.update(name.encode() + leaf.tobytes())
    assert digest.hexdigest() == LAYOUTS[LAYOUT_VERSION]
