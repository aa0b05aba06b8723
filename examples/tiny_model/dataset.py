"""Token arrays: made once by `prepare`, read by the other phases from one folder."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from . import corpus
from .tokenizer import END_OF_TEXT_ID, render_conversation, save_tokenizer, train_tokenizer

_ARRAYS, _FACTS, _PROMPTS = "tokens.npz", "corpus.json", "prompts.json"


@dataclass(frozen=True)
class Dataset:
    """What `prepare` left.

    Attributes:
        train: uint16 [N], documents end to end, each followed by the end-of-text token (one more at the very start).
        held_out: uint16 [M], the held-out source files in the same form.
        facts: Counts of files, bytes and tokens, and the Python version, for the model card.
        headers: Headers of held-out functions (`def` through docstring), to be completed.
    """

    train: np.ndarray
    held_out: np.ndarray
    facts: dict
    headers: list[str]
    tokenizer: Tokenizer


def prepare(root: Path, folder: Path, *, vocab_size: int, max_length: int, keep_every: int = 1) -> Dataset:
    """Reads the library, trains the tokenizer and writes the token arrays into the folder."""
    files = corpus.read_library(root, keep_every)
    training = [file for file in files if not file.held_out]
    held_out = [file for file in files if file.held_out]
    training_functions = corpus.unique_functions(training)
    chats = [render_conversation(chat) for chat in corpus.conversations(training_functions)]
    tokenizer = train_tokenizer((file.text for file in training), vocab_size)
    documents = sorted([*(file.text for file in training), *chats], key=corpus.text_digest)
    train_tokens = encode_documents(tokenizer, documents)
    held_out_tokens = encode_documents(tokenizer, [file.text for file in held_out])
    facts = {
        "python": platform.python_version(),
        "copyright": sys.copyright.splitlines()[0],
        "train_files": len(training),
        "train_bytes": _size(file.text for file in training),
        "conversations": len(chats),
        "conversation_bytes": _size(chats),
        "train_tokens": len(train_tokens),
        "held_out_files": len(held_out),
        "held_out_bytes": _size(file.text for file in held_out),
        "held_out_tokens": len(held_out_tokens),
    }
    seen = {function.source for function in training_functions}
    fresh = [function for function in corpus.unique_functions(held_out) if function.source not in seen]
    headers = [function.header for function in sorted(fresh, key=lambda function: function.digest)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    np.savez_compressed(folder / _ARRAYS, train=train_tokens, held_out=held_out_tokens)
    (folder / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (folder / _PROMPTS).write_text(json.dumps(headers), encoding="utf-8")
    save_tokenizer(tokenizer, folder, max_length)
    return Dataset(train_tokens, held_out_tokens, facts, headers, tokenizer)


def load(folder: Path) -> Dataset:
    """Reads what `prepare` wrote.

    Raises:
        FileNotFoundError: The folder was not prepared.
    """
    if not (folder / _ARRAYS).is_file():
        raise FileNotFoundError(f"no prepared data in {folder}: run the phase 'prepare' with the same --data first")
    with np.load(folder / _ARRAYS) as arrays:
        train, held_out = arrays["train"], arrays["held_out"]
    facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    headers = json.loads((folder / _PROMPTS).read_text(encoding="utf-8"))
    return Dataset(train, held_out, facts, headers, Tokenizer.from_file(str(folder / "tokenizer.json")))


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """The documents end to end: uint16 [N], an end-of-text token at the start and after each."""
    ids = [END_OF_TEXT_ID]
    for encoding in tokenizer.encode_batch(documents, add_special_tokens=False):
        ids.extend(encoding.ids)
        ids.append(END_OF_TEXT_ID)
    return np.array(ids, dtype=np.uint16)


def _size(texts) -> int:
    return sum(len(text.encode()) for text in texts)
