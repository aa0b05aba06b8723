"""Finds and reads a tokenizer: tokenizer.json directly, anything else through transformers."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from vjax.errors import ConfigError
from vjax.text.tokenizer import Tokenizer
from vjax.text.tokenizer_files import TokenizerFiles, read_tokenizer_files, resolve_directory


def load_tokenizer(
    name: str | Path | None = None,
    *,
    model_dir: str | Path | None = None,
    revision: str | None = None,
    download_dir: str | None = None,
) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        name: Directory, bundled model or hub id; None: `model_dir`.
        model_dir: The model's directory.
        revision: Of the hub repository.
        download_dir: Where hub files are kept; None: huggingface_hub's cache.

    Raises:
        ConfigError: There is no tokenizer, or it cannot be read.
    """
    source = name if name is not None else model_dir
    if source is None:
        raise ConfigError("no tokenizer was named; pass tokenizer=<directory or hub id>.", parameter="tokenizer")
    files = read_tokenizer_files(resolve_directory(source, revision, download_dir))
    if files.tokenizer_json is None:
        from vjax.text.hf_tokenizer import load_with_transformers

        return load_with_transformers(files.directory)
    try:
        backend = tokenizers.Tokenizer.from_file(str(files.tokenizer_json))
    except Exception as e:  # the tokenizers library raises plain Exception
        raise ConfigError(
            f"{files.tokenizer_json} cannot be read ({e}). It is damaged, or needs a newer `tokenizers` than "
            f"{tokenizers.__version__}.",
            parameter="tokenizer",
            value=str(files.tokenizer_json),
        ) from e
    _add_tokens(backend, files)
    special = {name: fields["content"] for name, fields in files.special_tokens.items()}
    return Tokenizer(backend, special, files.chat_templates, str(files.directory))


def _add_tokens(backend: tokenizers.Tokenizer, files: TokenizerFiles) -> None:
    """Adds the tokens that tokenizer_config.json knows and tokenizer.json does not, and flags the special ones."""
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    listed = sorted(files.config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    tokens = [tokenizers.AddedToken(**fields) for _, fields in listed]
    backend.add_tokens([token for token in tokens if repr(token) not in known])
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    wanted = [*files.special_tokens.values(), *files.extra_special_tokens]
    missing = {fields["content"]: tokenizers.AddedToken(**fields) for fields in wanted}
    backend.add_special_tokens([token for content, token in missing.items() if content not in special])
