"""Finds a tokenizer's files and reads what stands beside tokenizer.json. Knows file names, not tokenisation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vjax.errors import ConfigError

#: Files of a tokenizer that has no tokenizer.json; transformers reads these.
_OTHER_TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt", "*.tiktoken")
_HUB_PATTERNS = [
    "tokenizer*",
    "*token*.json",
    "vocab*",
    "merges.txt",
    "*.jinja",
    "*.tiktoken",
    "*.model",
    "config.json",
]
_ASSETS = Path(__file__).resolve().parent.parent / "assets"


@dataclass
class TokenizerFiles:
    """What a tokenizer's directory says, apart from tokenizer.json itself."""

    directory: Path
    #: None: transformers has to read this tokenizer.
    tokenizer_json: Path | None
    #: tokenizer_config.json as it stands.
    config: dict[str, Any] = field(default_factory=dict)
    #: Named special tokens (the fields of an AddedToken): tokenizer_config.json, then special_tokens_map.json.
    special_tokens: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: Further special tokens, in order.
    extra_special_tokens: list[dict[str, Any]] = field(default_factory=list)
    #: By name; "default" is the usual one.
    chat_templates: dict[str, str] = field(default_factory=dict)


def resolve_directory(name: str | Path, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The local directory of a tokenizer: a path, the name of a bundled model, or a hub id (its tokenizer files only).

    Raises:
        ConfigError: There is no such directory, and the hub does not give it either.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.name == "tokenizer.json":
        return path.parent
    if path.is_dir():
        return path
    if (_ASSETS / str(name)).is_dir():
        return _ASSETS / str(name)
    if path.is_absolute() or str(name).count("/") > 1 or str(name).startswith("."):
        raise ConfigError(
            f"tokenizer={str(name)!r}: there is no such directory.", parameter="tokenizer", value=str(name)
        )
    return _download(str(name), revision, download_dir)


def _download(repo: str, revision: str | None, download_dir: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repo, revision=revision, cache_dir=download_dir, allow_patterns=_HUB_PATTERNS))
    except Exception as e:  # the hub client raises many unrelated types: offline, missing, gated, malformed id
        raise ConfigError(
            f"tokenizer={repo!r} is neither a local directory nor a tokenizer that the Hugging Face hub gives here "
            f"({type(e).__name__}: {e}). Pass a directory with tokenizer.json, or skip_tokenizer_init=True to work "
            "with token ids alone.",
            parameter="tokenizer",
            value=repo,
        ) from e


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """Reads tokenizer_config.json, special_tokens_map.json and the chat templates of a directory.

    Raises:
        ConfigError: No tokenizer is there, or a file cannot be parsed.
    """
    tokenizer_json = directory / "tokenizer.json"
    if not tokenizer_json.is_file() and not any(any(directory.glob(name)) for name in _OTHER_TOKENIZER_FILES):
        raise ConfigError(
            f"{directory} holds no tokenizer (tokenizer.json, or one of {', '.join(_OTHER_TOKENIZER_FILES)}). Pass "
            "tokenizer=<directory or hub id>, or skip_tokenizer_init=True to work with token ids alone.",
            parameter="tokenizer",
            value=str(directory),
        )
    files = TokenizerFiles(directory, tokenizer_json if tokenizer_json.is_file() else None)
    files.config = _read_json(directory / "tokenizer_config.json")
    _read_special_tokens(files)
    files.chat_templates = _read_chat_templates(directory, files.config)
    return files


def _read_special_tokens(files: TokenizerFiles) -> None:
    # special_tokens_map.json is the older home of the same facts: it counts only where the config lists no tokens.
    sources = [files.config]
    if "added_tokens_decoder" not in files.config:
        sources.append(_read_json(files.directory / "special_tokens_map.json"))
    for source in sources:
        for name, value in source.items():
            if name.endswith("_token") and isinstance(value, (str, dict)):
                files.special_tokens[name] = _token_fields(value)
        extra = source.get("extra_special_tokens") or source.get("additional_special_tokens") or []
        if isinstance(extra, dict):
            files.special_tokens.update({name: _token_fields(value) for name, value in extra.items()})
        else:
            files.extra_special_tokens = [_token_fields(value) for value in extra] or files.extra_special_tokens


def _token_fields(value: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(value, str):
        return {"content": value, "special": True, "normalized": False}
    return {name: v for name, v in value.items() if name != "__type"} | {"special": True}


def _read_chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Template files take the place of the config's templates, as transformers has it."""
    templates = {path.stem: path.read_text("utf-8") for path in directory.glob("additional_chat_templates/*.jinja")}
    main = directory / "chat_template.jinja"
    if main.is_file():
        templates["default"] = main.read_text("utf-8")
    if templates:
        return templates
    in_config = config.get("chat_template")
    if isinstance(in_config, list):
        return {entry["name"]: entry["template"] for entry in in_config}
    return {"default": in_config} if in_config else {}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} is not valid JSON ({e}); restore the file.", value=str(path)) from e
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object; restore the file.", value=str(path))
    return content
