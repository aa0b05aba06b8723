"""Where a model's directory is."""

from __future__ import annotations

import pytest

from vjax.errors import ModelLoadError
from vjax.weights import hub
from vjax.weights.hub import resolve_model_path


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
