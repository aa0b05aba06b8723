"""What a request may do to its logits before a token is drawn from them.

Order as in vLLM's second model runner: allowed ids, biases, penalties, bad words, users' own processors, the end of
reasoning (and min_tokens, `sampler.mask_ids`:
where in the order does not matter to what becomes -inf). Every function leaves the rows that do not use it as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class History(NamedTuple):
    """The tokens of R sequences so far: the prompt, then what was drawn."""

    token_ids: jax.Array
    """i32 [R, L]; anything from `num_tokens` on."""
    num_tokens: jax.Array
    """i32 [R]."""
    num_prompt_tokens: jax.Array
    """i32 [R]."""


class BadWords(NamedTuple):
    """Sequences of tokens that may not be completed, one after the other in S slots a row."""

    token_ids: jax.Array
    """i32 [R, S]."""
    first: jax.Array
    """i32 [R, S], the slot of the first token of the same word."""
    last: jax.Array
    """i32 [R, S], the slot of its last token; -1 where there is no word."""


def keep_allowed(logits: jax.Array, bitmask: jax.Array, active: jax.Array) -> jax.Array:
    """-inf for the ids whose bit is not set, in the rows where `active` bool [R].

    Args:
        logits: f32 [R, V].
        bitmask: i32 [R, ceil(V / 32)]; bit i % 32 of word i // 32 is id i.
    """
    bits = (bitmask[:, :, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
    allowed = bits.reshape(logits.shape[0], -1)[:, : logits.shape[1]] == 1
    return jnp.where(allowed | ~active[:, None], logits, -jnp.inf)


def add_bias(logits: jax.Array, ids: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds bias f32 [R, B] to logits f32 [R, V] at ids i32 [R, B]; ids out of the vocabulary are dropped."""
    return logits.at[_rows(logits), ids].add(bias, mode="drop")


def penalize(
    logits: jax.Array, history: History, *, repetition: jax.Array, frequency: jax.Array, presence: jax.Array
) -> jax.Array:
    """Repetition penalty (CTRL, Keskar et al. 2019) of what is in prompt or output; frequency and presence penalties,
    as OpenAI defines them, of what is in the output. Penalties are f32 [R]; 1, 0 and 0 are none.

    No count is kept for each id of the vocabulary: a token that occurs again is written again, with the same value, or
    has its penalty subtracted once more.
    """
    row, vocab_size = _rows(logits), logits.shape[1]
    position = jnp.arange(history.token_ids.shape[1], dtype=jnp.int32)
    known = position < history.num_tokens[:, None]
    seen = jnp.where(known, history.token_ids, vocab_size)
    drawn = jnp.where(position >= history.num_prompt_tokens[:, None], seen, vocab_size)

    value = logits.at[row, seen].get(mode="fill", fill_value=0)
    factor = repetition[:, None]
    logits = logits.at[row, seen].set(jnp.where(value > 0, value / factor, value * factor), mode="drop")
    logits = logits.at[row, drawn].add(jnp.broadcast_to(-frequency[:, None], drawn.shape), mode="drop")
    value = logits.at[row, drawn].get(mode="fill", fill_value=0)
    return logits.at[row, drawn].set(value - presence[:, None], mode="drop")


def mask_bad_words(logits: jax.Array, history: History, words: BadWords) -> jax.Array:
    """-inf for the last token of each word whose other tokens are the latest of the output."""
    slot = jnp.arange(words.token_ids.shape[1], dtype=jnp.int32)
    distance = words.last - slot
    position = history.num_tokens[:, None] - distance
    token = jnp.take_along_axis(history.token_ids, jnp.clip(position, 0, history.token_ids.shape[1] - 1), axis=1)
    differs = (distance > 0) & ((token != words.token_ids) | (position < history.num_prompt_tokens[:, None]))
    differs = differs.astype(jnp.int32)
    # Differences up to each slot; those of a word are the difference between its ends.
    total = jnp.cumsum(differs, axis=1)
    before = jnp.take_along_axis(total - differs, jnp.maximum(words.first, 0), axis=1)
    completed = (words.last == slot) & (total == before)
    ids = jnp.where(completed, words.token_ids, logits.shape[1])
    return logits.at[_rows(logits), ids].set(-jnp.inf, mode="drop")


def end_thinking(
    logits: jax.Array, history: History, budget: jax.Array, *, start: tuple[int, ...], end: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Leaves the next token of `end` alone where a row has thought for `budget` i32 [R] tokens (-1: no limit).

    A row thinks from the first `start` behind its latest `end`. Thinking in the prompt counts, and is ended with the
    first tokens of the output at the earliest.

    Returns:
        The logits, and which rows they leave one token, bool [R].
    """
    length = history.token_ids.shape[1]
    closed = jnp.max(_ends(history, end), axis=1, initial=0)
    starts = _ends(history, start)
    opened = jnp.min(starts, axis=1, where=starts - len(start) >= closed[:, None], initial=length + 1)
    forced_from = jnp.maximum(opened + budget, history.num_prompt_tokens)
    step = history.num_tokens - forced_from
    forced = (budget >= 0) & (opened <= length) & (step >= 0)
    token = jnp.asarray(end, jnp.int32)[jnp.clip(step, 0, len(end) - 1)]
    only = jnp.where(jnp.arange(logits.shape[1]) == token[:, None], jnp.float32(0), -jnp.inf)
    return jnp.where(forced[:, None], only, logits), forced


def _ends(history: History, sequence: tuple[int, ...]) -> jax.Array:
    """The positions behind each occurrence of `sequence` in each history, i32 [R, L]; -1 where there is none."""
    length = history.token_ids.shape[1]
    num_ends = max(length - len(sequence) + 1, 0)
    ends = jnp.arange(num_ends, dtype=jnp.int32) + len(sequence)
    found = ends <= history.num_tokens[:, None]
    for i, token_id in enumerate(sequence):
        found &= history.token_ids[:, i : i + num_ends] == token_id
    return jnp.where(found, ends, -1)


def _rows(logits: jax.Array) -> jax.Array:
    return jnp.arange(logits.shape[0])[:, None]
