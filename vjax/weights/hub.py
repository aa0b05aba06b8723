"""Finds the directory of a model: local, bundled, or from the Hugging Face hub. No jax."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from vjax.errors import ModelLoadError

#: Folder of a model directory that holds an Orbax checkpoint of the engine's leaves.
ORBAX_FOLDER = "vjax_orbax"

#: The model that ships inside the package.
BUNDLED_MODEL = "vjax-tiny"

#: What is fetched from a hub repository: safetensors in Hugging Face naming, what `vjax convert --to orbax` wrote,
#: configs, tokenizer files.
ALLOW_PATTERNS = ["*.safetensors", f"{ORBAX_FOLDER}/*", "*.json", "*.jinja", "*.txt", "*.model"]
IGNORE_PATTERNS = ["original/*", "consolidated*", "onnx/*", "metal/*"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_model_path(model: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The directory that holds config.json, tokenizer and weights of a model.

    Args:
        model: A directory, "vjax-tiny" for the bundled model, or a hub id such as "meta-llama/Llama-3.1-8B".
        revision: Branch, tag or commit of a hub id.
        download_dir: Cache folder for the hub; None is huggingface_hub's own (`HF_HOME`).

    Raises:
        ModelLoadError: There is no such directory, or the hub (offline: its cache) does not give the model.
    """
    return _resolve(model, revision, download_dir, ALLOW_PATTERNS)


def resolve_config_path(model: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """Like `resolve_model_path`, but of a hub id only the JSON files are fetched."""
    return _resolve(model, revision, download_dir, ["*.json"])


def _resolve(model: str, revision: str | None, download_dir: str | None, patterns: list[str]) -> Path:
    local = Path(model).expanduser()
    if model and local.is_dir():
        return local
    if model == BUNDLED_MODEL:
        return _bundled()
    if local.is_file():
        raise ModelLoadError(f"Model {model!r} is a file; a Hugging Face model directory is needed.", parameter="model")
    if not _HUB_ID.fullmatch(model):
        where = "" if local.is_absolute() else f"; a relative path counts from {Path.cwd()}"
        raise ModelLoadError(
            f"Model {model!r} is neither a directory that exists nor a hub id of the form owner/name{where}.",
            parameter="model",
            value=model,
        )
    return _from_hub(model, revision, download_dir, patterns)


def _bundled() -> Path:
    path = Path(str(resources.files("vjax") / "assets" / BUNDLED_MODEL))
    if not path.is_dir():
        raise ModelLoadError(f"The bundled model is missing at {path}; install vjax again.", parameter="model")
    return path


def _from_hub(model: str, revision: str | None, download_dir: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(
            model,
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=patterns,
            ignore_patterns=IGNORE_PATTERNS,
        )
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"Model {model!r}{f' at revision {revision!r}' if revision else ''} is no local directory and could not be "
            f"had from the Hugging Face hub or its cache: {_one_line(error)}. Check the name, the network and (for a "
            "gated model) the token, or pass the path of a downloaded directory.",
            parameter="model",
            value=model,
        ) from error
    return Path(path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
