"""Completing held-out function headers, and how many completions are valid Python."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from tokenizers import Tokenizer

from .corpus import parses
from .model import TinyLlama
from .tokenizer import END_OF_TEXT_ID


@partial(nnx.jit, static_argnames=("new_tokens",))
def _complete(model: TinyLlama, tokens: ArrayLike, lengths: ArrayLike, temperature: ArrayLike, seed, new_tokens: int):
    """Appends `new_tokens` samples to each row by recomputing the whole row; returns the tokens.

    Args:
        tokens: int32 [rows, width], prompts from column 0, with room for the new tokens.
        lengths: int32 [rows], prompt lengths.
        temperature: fp32 scalar, positive.
        seed: uint32 scalar.
    """
    graph, state = nnx.split(model)
    tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
    rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    key = jax.random.key(seed)

    def body(index, tokens):
        merged = nnx.merge(graph, state)
        hidden = merged.hidden(tokens)[rows, lengths + index - 1]
        logits = merged.logits(hidden) / temperature
        sampled = jax.random.categorical(jax.random.fold_in(key, index), logits).astype(jnp.int32)
        return tokens.at[rows, lengths + index].set(sampled)

    return jax.lax.fori_loop(0, new_tokens, body, tokens)


def complete(
    model: TinyLlama,
    tokenizer: Tokenizer,
    prompts: list[str],
    *,
    max_prompt_tokens: int,
    new_tokens: int,
    temperature: float,
    seed: int,
) -> list[str]:
    """Samples one completion for each prompt, up to an end-of-text token; prompts that are too long are an error.

    Raises:
        ValueError: A prompt has more than `max_prompt_tokens` tokens.
    """
    if not prompts:
        return []
    ids = [encoding.ids for encoding in tokenizer.encode_batch(prompts, add_special_tokens=False)]
    lengths = np.array([len(row) for row in ids], dtype=np.int32)
    if lengths.max() > max_prompt_tokens:
        raise ValueError(f"a prompt has {lengths.max()} tokens; at most {max_prompt_tokens} are allowed")
    tokens = np.zeros((len(ids), max_prompt_tokens + new_tokens), dtype=np.int32)
    for row, prompt in zip(tokens, ids, strict=True):
        row[: len(prompt)] = prompt
    filled = _complete(model, tokens, lengths, np.float32(temperature), np.uint32(seed), new_tokens=new_tokens)
    completions = []
    for row, length in zip(np.asarray(filled), lengths, strict=True):
        new = row[length : length + new_tokens].tolist()
        end = new.index(END_OF_TEXT_ID) if END_OF_TEXT_ID in new else len(new)
        completions.append(tokenizer.decode(new[:end]) if end < len(new) else _whole_lines(tokenizer.decode(new)))
    return completions


def _whole_lines(text: str) -> str:
    """Drops the last line, which the token limit cut."""
    return text[: text.rfind("\n") + 1]


def function_body(completion: str) -> str:
    """The part of a completion that belongs to the function: up to the first line that begins in column 0."""
    body = []
    for line in completion.split("\n"):
        if line and not line[0].isspace():
            break
        body.append(line)
    return "\n".join(body).rstrip() + "\n"


def is_valid(header: str, completion: str) -> bool:
    """Whether the header and the function's part of the completion parse; an empty body counts as a failure."""
    body = function_body(completion)
    return bool(body.strip()) and parses(header + body)


def select_headers(tokenizer: Tokenizer, headers: list[str], count: int, max_tokens: int) -> list[str]:
    """The first `count` headers of at most `max_tokens` tokens."""
    encodings = tokenizer.encode_batch(headers, add_special_tokens=False)
    short = [header for header, encoding in zip(headers, encodings, strict=True) if len(encoding.ids) <= max_tokens]
    return short[:count]
