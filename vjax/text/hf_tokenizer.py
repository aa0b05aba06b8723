"""Tokenizers without tokenizer.json, through transformers. This is the only module here that imports it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers

from vjax.errors import ConfigError
from vjax.text.decode_stream import DecodeStream, WindowStream
from vjax.text.tokenizer import Tokenizer

_INSTALL = "Run pip install 'vjax[slow-tokenizers]'"
_SENTENCEPIECE = ("tokenizer.model", "spiece.model")


def load_with_transformers(directory: Path) -> Tokenizer:
    """Loads the tokenizer of a local directory with `transformers.AutoTokenizer`; code of the repository is not run.

    Raises:
        ConfigError: transformers is missing or cannot read the directory.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as e:
        raise ConfigError(
            f"{directory} has no tokenizer.json, and transformers, which could convert the tokenizer, is not "
            f"installed. {_INSTALL}, or save the tokenizer as tokenizer.json.",
            parameter="tokenizer",
            value=str(directory),
        ) from e
    try:
        loaded: Any = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as e:  # transformers raises many types for a directory that it cannot read
        # transformers takes the file for another library's then, and its message leads astray.
        lacks = find_spec("sentencepiece") is None and any((directory / name).is_file() for name in _SENTENCEPIECE)
        hint = f"sentencepiece, which reads {' and '.join(_SENTENCEPIECE)}, is not installed. {_INSTALL}, or pass"
        raise ConfigError(
            f"{directory} has no tokenizer.json, and transformers cannot read its tokenizer "
            f"({type(e).__name__}: {e}). {hint if lacks else 'Pass'} tokenizer=<directory with tokenizer.json>.",
            parameter="tokenizer",
            value=str(directory),
        ) from e
    special = {name: token for name, token in loaded.special_tokens_map.items() if isinstance(token, str)}
    templates = loaded.chat_template
    templates = templates if isinstance(templates, dict) else {"default": templates} if templates else {}
    backend = getattr(loaded, "backend_tokenizer", None)
    if isinstance(backend, tokenizers.Tokenizer):
        return Tokenizer(backend, special, templates, str(directory))
    return SlowTokenizer(loaded, special, templates, str(directory))


class SlowTokenizer(Tokenizer):
    """A tokenizer that only transformers can run."""

    def __init__(self, loaded: Any, special_tokens: dict[str, str], chat_templates: dict[str, str], name_or_path: str):
        # The base class's constructor prepares the backend that is missing here.
        self._loaded = loaded
        self._loaded.truncation_side = "left"
        self.name_or_path = name_or_path
        self.special_tokens_map = special_tokens
        self.chat_templates = chat_templates

    def __len__(self) -> int:
        return len(self._loaded)

    @property
    def vocab_size(self) -> int:
        return self._loaded.vocab_size

    @property
    def is_fast(self) -> bool:
        return False

    @property
    def all_special_ids(self) -> list[int]:
        return sorted(self._loaded.all_special_ids)

    @property
    def all_special_tokens(self) -> list[str]:
        return self._loaded.convert_ids_to_tokens(self.all_special_ids)

    def get_vocab(self) -> dict[str, int]:
        return self._loaded.get_vocab()

    def get_added_vocab(self) -> dict[str, int]:
        return self._loaded.get_added_vocab()

    def encode(self, text: str, add_special_tokens: bool = True, max_length: int | None = None) -> list[int]:
        length = {} if max_length is None else {"truncation": True, "max_length": max_length}
        return list(self._loaded.encode(text, add_special_tokens=add_special_tokens, **length))

    def encode_pair(self, text: str, pair: str, add_special_tokens: bool = True) -> list[int]:
        return list(self._loaded.encode(text, pair, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._loaded.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, token_ids: Sequence[int]) -> list[str]:
        return [token or "" for token in self._loaded.convert_ids_to_tokens(list(token_ids))]

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.get_vocab().get(token)

    def decode_stream(
        self,
        prompt_token_ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> DecodeStream:
        def decode(ids: list[int]) -> str:
            return self._loaded.decode(
                ids,
                skip_special_tokens=skip_special_tokens,
                spaces_between_special_tokens=spaces_between_special_tokens,
            )

        return WindowStream(decode, prompt_token_ids)
