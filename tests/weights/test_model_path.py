"""Where a model's directory is."""

from __future__ import annotations

import shutil

import pytest
from huggingface_hub.utils import filter_repo_objects

from vjax import LLM, SamplingParams
from vjax.errors import ModelLoadError
from vjax.text.load import load_tokenizer
from vjax.weights import hub
from vjax.weights.hub import resolve_model_path
from vjax.weights.inspection import inspect_model


def test_a_directory(tmp_path):
    assert resolve_model_path(str(tmp_path)) == tmp_path


def test_the_bundled_model():
    path = resolve_model_path("vjax-tiny")
    assert path.name == "vjax-tiny" and path.parent.name == "assets"


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nowhere", "a/b/c", "", "spaces in name"])
def test_what_is_neither_directory_nor_hub_id(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match="neither a directory that exists nor a hub id"):
        resolve_model_path(model)


def test_a_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelLoadError, match="is a file"):
        resolve_model_path(str(tmp_path / "model.safetensors"))


def test_the_hub_is_asked_for_what_is_needed(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(model, **options):
        asked.update(options, model=model)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model_path("owner/name", revision="v1", download_dir="cache") == tmp_path
    assert (asked["model"], asked["revision"], asked["cache_dir"]) == ("owner/name", "v1", "cache")
    assert "*.safetensors" in asked["allow_patterns"] and "original/*" in asked["ignore_patterns"]


def test_offline_without_a_cached_copy(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match=r"'owner/name' at revision 'v1' .* network"):
        resolve_model_path("owner/name", revision="v1", download_dir=str(tmp_path))


def test_the_patterns_keep_publishers_own_formats_out():
    assert "consolidated*" in hub.IGNORE_PATTERNS


# ---- the hub's cache, offline -------------------------------------------------------------------------------------

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the hub that holds owner/name, the bundled model, at two revisions; of v1 no weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--owner--name"
    for revision, commit in COMMITS.items():
        snapshot = repository / "snapshots" / commit
        shutil.copytree(resolve_model_path("vjax-tiny"), snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    (repository / "snapshots" / COMMITS["v1"] / "model.safetensors").unlink()
    return tmp_path / "cache"


@pytest.mark.parametrize("revision", [None, "main", "v1", COMMITS["v1"]])
def test_revisions_in_the_offline_cache(cache, revision):
    path = resolve_model_path("owner/name", revision, str(cache))
    assert path.name == COMMITS.get(revision or "main", revision)
    config = hub.resolve_config_path("owner/name", revision, str(cache))
    assert config.name == path.name
    assert len(load_tokenizer("owner/name", revision=revision, download_dir=str(cache))) > 0


def test_a_revision_that_is_not_in_the_offline_cache(cache):
    with pytest.raises(ModelLoadError, match=r"'owner/name' at revision 'v2' .* cache"):
        resolve_model_path("owner/name", "v2", str(cache))


def test_an_engine_from_the_offline_cache(cache):
    small = {"max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 4 << 20}
    with LLM("owner/name", revision="main", download_dir=str(cache), **small) as llm:
        (output,) = llm.generate("def", SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 2
    with pytest.raises(ModelLoadError, match="has no weights"):
        LLM("owner/name", revision="v1", download_dir=str(cache), **small)


def test_config_files_alone_of_a_model_in_several_files(cache):
    """What `vjax models owner/name` fetches: the index names files that are not there."""
    folder = hub.resolve_config_path("owner/name", "v1", str(cache))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    assert not inspect_model(folder).weights_checked


def test_an_orbax_checkpoint_is_fetched_whole():
    files = ["vjax_orbax/manifest.json", "vjax_orbax/part-00000/d/0123", "config.json", "pytorch_model.bin"]
    wanted = filter_repo_objects(files, allow_patterns=hub.ALLOW_PATTERNS, ignore_patterns=hub.IGNORE_PATTERNS)
    assert [*wanted] == files[:3]
