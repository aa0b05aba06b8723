"""What requests do to their logits, as far as it takes more than a column of their row: lists of ids, on the device.

Allocated when the first request needs it; entries belong to a row whose flags say so (see `packing.py`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from vjax.messages import RowInit
from vjax.sample.processors import BadWords
from vjax.sampling_params import MAX_LOGIT_BIASES, MAX_LOGPROB_TOKEN_IDS

#: Of one request's bad words together; vLLM's.
MAX_BAD_WORDS_TOKENS = 1024

#: An id that is in no vocabulary: writes there are dropped.
_NO_ID = np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ProcessorState:
    """N = max_num_seqs + 1 rows; row 0 is the null row.

    Attributes:
        bias_ids: i32 [N, MAX_LOGIT_BIASES]; padding is out of the vocabulary.
        bias: i32 [N, MAX_LOGIT_BIASES], bits of float32.
        allowed: i32 [N, ceil(vocab_size / 32)], see `processors.keep_allowed`.
        bad_word_ids, bad_word_first, bad_word_last: i32 [N, MAX_BAD_WORDS_TOKENS], see `processors.BadWords`.
        logprob_ids: i32 [N, MAX_LOGPROB_TOKEN_IDS], ids whose log probability is wanted; padding is 0.
        thinking_budget: i32 [N, 1]; -1 where there is none.
        custom: i32 [N, num_columns], bits of float32: what users' processors keep (see `logits_processor.py`); an
            engine without them has no such array.
    """

    bias_ids: jax.Array
    bias: jax.Array
    allowed: jax.Array
    bad_word_ids: jax.Array
    bad_word_first: jax.Array
    bad_word_last: jax.Array
    logprob_ids: jax.Array
    thinking_budget: jax.Array
    custom: jax.Array | None = None

    def bad_words(self, row_ids: jax.Array) -> BadWords:
        return BadWords(self.bad_word_ids[row_ids], self.bad_word_first[row_ids], self.bad_word_last[row_ids])


_FIELDS = tuple(f.name for f in dataclasses.fields(ProcessorState))


@dataclass(frozen=True)
class ProcessorLayout:
    """The buffer that writes one row of the state: the row, then a value for each entry."""

    vocab_size: int
    #: Of users' processors.
    num_custom: int = 0

    @property
    def widths(self) -> dict[str, int]:
        words = MAX_BAD_WORDS_TOKENS
        sizes = (MAX_LOGIT_BIASES, MAX_LOGIT_BIASES, -(-self.vocab_size // 32), words, words, words)
        widths = dict(zip(_FIELDS, (*sizes, MAX_LOGPROB_TOKEN_IDS, 1, self.num_custom), strict=True))
        return {name: width for name, width in widths.items() if width}

    @property
    def size(self) -> int:
        return 1 + sum(self.widths.values())

    def specs(self, max_num_seqs: int) -> ProcessorState:
        """Shapes and dtypes, as a ProcessorState of ShapeDtypeStructs."""
        n = max_num_seqs + 1
        return ProcessorState(**{f: jax.ShapeDtypeStruct((n, w), jnp.int32) for f, w in self.widths.items()})  # pyright: ignore[reportArgumentType]

    def pack(self, init: RowInit) -> np.ndarray:
        """i32 [size]."""
        params = init.sampling_params
        buffer = np.zeros(self.size, np.int32)
        buffer[0] = init.row
        part = self._parts(buffer)
        biases = params.logit_bias or {}
        part["bias_ids"][:] = _NO_ID
        part["bias_ids"][: len(biases)] = list(biases)
        part["bias"][: len(biases)] = np.array(list(biases.values()), np.float32).view(np.int32)
        ids = np.array(params.allowed_token_ids or [], np.int64)
        np.bitwise_or.at(part["allowed"].view(np.uint32), ids // 32, np.uint32(1) << (ids % 32).astype(np.uint32))
        part["bad_word_last"][:] = -1
        slot = 0
        for word in init.bad_words_token_ids:
            end = slot + len(word)
            part["bad_word_ids"][slot:end] = word
            part["bad_word_first"][slot:end] = slot
            part["bad_word_last"][slot:end] = end - 1
            slot = end
        named = params.logprob_token_ids or []
        part["logprob_ids"][: len(named)] = named
        part["thinking_budget"][:] = -1 if params.thinking_token_budget is None else params.thinking_token_budget
        if init.processor_values:
            part["custom"][:] = np.array(init.processor_values, np.float32).view(np.int32)
        return buffer

    def write(self, state: ProcessorState, packed: jax.Array) -> ProcessorState:
        """The state with the row of `packed` replaced."""
        parts = self._parts(packed)
        return ProcessorState(**{f: getattr(state, f).at[packed[0]].set(part) for f, part in parts.items()})

    def _parts(self, buffer):
        parts, start = {}, 1
        for name, width in self.widths.items():
            parts[name] = buffer[start : start + width]
            start += width
        return parts
