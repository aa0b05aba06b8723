"""Decodes a continuation token by token: the text that a token adds, in O(1), and never half a character.

Three decoders, by what tokenizer.json's `decoder` does:

    ByteLevelStream  every token is a byte string (GPT-2, Llama 3, Qwen): bytes run through a UTF-8 decoder
    PieceStream      every token is a piece of text or one byte (SentencePiece: Llama 2, Mistral 7B, Gemma)
    WindowStream     anything else: the last few tokens are decoded again for each new one

A SentencePiece decoder drops the space before the first piece of a text. The text here continues a prompt, so that
space is kept, and prompt + text is the whole text; after a prompt without visible tokens (BOS alone) it is dropped.
Otherwise the pieces of a stream, joined, equal the tokenizer's own decode of the same ids. One exception: where a run
of byte tokens turns out not to be UTF-8, tokenizers replaces the whole run with U+FFFD, and a stream only what comes
after the characters that were complete.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import tokenizers

REPLACEMENT = "\ufffd"
#: Prompt tokens that a WindowStream decodes with the first new ones.
_WINDOW_CONTEXT = 8
#: A WindowStream waits this many tokens for a U+FFFD to become a character.
_WINDOW_WAIT = 8


class DecodeStream(Protocol):
    """State of one continuation."""

    def push(self, token_id: int) -> str:
        """The text that becomes certain with this token; "" while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character."""
        ...


class StreamFactory:
    """Makes the streams of one tokenizer. The tables of pieces fill as tokens occur and are shared by all streams."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        self._decoders = _decoder_steps(backend)
        self._tables: dict[bool, tuple[_Table, frozenset[int]]] = {}

    def new(self, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> DecodeStream:
        if skip_special_tokens not in self._tables:
            self._tables[skip_special_tokens] = self._build(skip_special_tokens)
        pieces, hidden = self._tables[skip_special_tokens]
        if isinstance(pieces, _BytePieces):
            return ByteLevelStream(pieces)

        def decode(ids: list[int]) -> str:
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

        if pieces is None:
            return WindowStream(decode, prompt_token_ids)
        at_start = all(i in hidden for i in prompt_token_ids)
        return PieceStream(pieces, decode if at_start else None)

    def _build(self, skip_special_tokens: bool) -> tuple[_Table, frozenset[int]]:
        added = self._backend.get_added_tokens_decoder().items()
        hidden = frozenset(i for i, token in added if token.special) if skip_special_tokens else frozenset()
        types = [step.get("type") for step in self._decoders]
        if types == ["ByteLevel"]:
            return _BytePieces(self._backend, hidden), hidden
        anchor = _find_anchor(self._backend)
        if anchor is None or not _is_piecewise(self._decoders):
            return None, hidden
        return _TextPieces(self._backend, hidden, anchor, "ByteFallback" in types), hidden


class ByteLevelStream:
    """Tokens are byte strings; an incomplete character waits for its last byte."""

    __slots__ = ("_decode", "_pieces")

    def __init__(self, pieces: _BytePieces):
        self._pieces = pieces
        self._decode: Callable[..., str] = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_id: int) -> str:
        return self._decode(self._pieces[token_id])

    def flush(self) -> str:
        return self._decode(b"", True)


class PieceStream:
    """Tokens are pieces of text, or single bytes that join to characters ("byte fallback")."""

    __slots__ = ("_broken", "_decode_start", "_pieces", "_run", "_start_ids")

    def __init__(self, pieces: _TextPieces, decode_start: Callable[[list[int]], str] | None):
        """
        Args:
            decode_start: The tokenizer's decode, where the stream begins the text; it drops the first space.
        """
        self._pieces = pieces
        self._decode_start = decode_start
        self._start_ids: list[int] = []
        self._run = bytearray()
        self._broken = False

    def push(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if piece == "":
            return ""  # hidden tokens do not end a run of bytes either
        text = self._push_byte(piece) if isinstance(piece, int) else self._end_run() + piece
        if self._decode_start is None:
            return text
        self._start_ids.append(token_id)
        if text:
            text = self._decode_start(self._start_ids)
            self._decode_start = None
        return text

    def flush(self) -> str:
        return self._end_run()

    def _push_byte(self, byte: int) -> str:
        if self._broken:
            return REPLACEMENT
        self._run.append(byte)
        try:
            text = self._run.decode()
        except UnicodeDecodeError as e:
            if e.reason == "unexpected end of data":
                return ""
            text = REPLACEMENT * len(self._run)
            self._broken = True
        self._run.clear()
        return text

    def _end_run(self) -> str:
        text = REPLACEMENT * len(self._run)
        self._run.clear()
        self._broken = False
        return text


class WindowStream:
    """Decodes the last tokens with and without the new one and returns the difference."""

    __slots__ = ("_decode", "_ids", "_num_waiting", "_prefix")

    def __init__(self, decode: Callable[[list[int]], str], prompt_token_ids: Sequence[int]):
        self._decode = decode
        self._ids = list(prompt_token_ids[-_WINDOW_CONTEXT:])
        self._prefix = decode(self._ids) if self._ids else ""
        self._num_waiting = 0
        if self._prefix.endswith(REPLACEMENT):
            self._ids, self._prefix = [], ""

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        self._num_waiting += 1
        text = self._decode(self._ids)
        if text == self._prefix or (text.endswith(REPLACEMENT) and self._num_waiting < _WINDOW_WAIT):
            if text == self._prefix and len(self._ids) > 2 * _WINDOW_CONTEXT:
                del self._ids[-self._num_waiting :]
                self._num_waiting = 0
            return ""
        return self._emit(text)

    def flush(self) -> str:
        return self._emit(self._decode(self._ids)) if self._num_waiting else ""

    def _emit(self, text: str) -> str:
        new = text[len(self._prefix) :]
        self._ids = self._ids[-self._num_waiting :]
        self._prefix = self._decode(self._ids)
        self._num_waiting = 0
        return new


class _Pieces(dict):
    """Token id -> what it stands for, filled on demand. "" or b"": nothing (hidden, or no such token)."""

    def __init__(self, backend: tokenizers.Tokenizer, hidden: frozenset[int]):
        super().__init__()
        self._backend = backend
        self._hidden = hidden

    def _token(self, token_id: int) -> str:
        """The vocabulary's spelling, "" where nothing is shown."""
        return "" if token_id in self._hidden else (self._backend.id_to_token(token_id) or "")


class _BytePieces(_Pieces):
    """Values are bytes."""

    def __missing__(self, token_id: int) -> bytes:
        token = self._token(token_id)
        try:
            piece = bytes(_BYTE_OF_CHAR[c] for c in token)
        except KeyError:  # an added token is spelled as it reads
            piece = token.encode()
        self[token_id] = piece
        return piece


class _TextPieces(_Pieces):
    """Values are str, or int for a byte token. The text is what the token adds after other text: after the anchor."""

    def __init__(self, backend: tokenizers.Tokenizer, hidden: frozenset[int], anchor: int, byte_fallback: bool):
        super().__init__(backend, hidden)
        self._anchor = anchor
        self._anchor_length = len(backend.decode([anchor]))
        self._byte_fallback = byte_fallback

    def __missing__(self, token_id: int) -> str | int:
        token = self._token(token_id)
        piece: str | int = ""
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            piece = int(token[3:5], 16)
        elif token:
            ids = [self._anchor, token_id]
            piece = self._backend.decode(ids, skip_special_tokens=False)[self._anchor_length :]
        self[token_id] = piece
        return piece


_Table = _BytePieces | _TextPieces | None


def _byte_of_char() -> dict[str, int]:
    """The alphabet of byte-level BPE (github.com/openai/gpt-2): printable Latin-1 bytes are themselves, the others are
    the characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder of tokenizer.json as a flat list of steps."""
    if backend.decoder is None:
        return []
    spec = json.loads(backend.decoder.__getstate__())
    return spec["decoders"] if spec["type"] == "Sequence" else [spec]


def _is_piecewise(steps: list[dict[str, Any]]) -> bool:
    """Whether decoding maps token by token, the start of the text and runs of bytes apart."""
    fused = False
    for step in steps:
        kind = step["type"]
        if kind == "Fuse":
            fused = True
        elif kind == "Replace":
            pattern = step["pattern"].get("String")
            if fused and (pattern is None or len(pattern) != 1):
                return False
        elif kind == "Strip":
            if step["start"] > 1 or (step["stop"] and fused):
                return False
        elif kind not in ("ByteFallback", "Metaspace"):
            return False
    return bool(steps)


def _find_anchor(backend: tokenizers.Tokenizer) -> int | None:
    """A token whose text is the same wherever it stands."""
    for token in ("a", "e", "A", "0", ".", ","):
        token_id = backend.token_to_id(token)
        if token_id is not None and backend.decode([token_id, token_id]) == token * 2:
            return token_id
    return None
