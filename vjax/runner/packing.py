"""The one int32 buffer that carries a step from the host to the device.

Both sides of the format live here: `PackedLayout.pack` fills a numpy buffer from a `SchedulerOutput`, and
`PackedLayout.unpack` slices the traced array. Counts in the header mask what is beyond them, so the host never clears
padding. Floats travel bit-cast.

    header | rows [S] | cu_tokens [S+1] | token_ids [T] | block updates 3 x [U] | row records [N, W]
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from vjax.messages import RowInit, SchedulerOutput
from vjax.runner.buckets import ForwardBucket

_HEADER = ("num_tokens", "num_seqs", "num_sampled", "num_block_updates", "num_row_records")

#: Columns of a row record; the sampling columns stay on the device in this order (see rows.py).
RECORD_COLUMNS = (
    "row",
    "num_computed",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed_low",
    "seed_high",
    "min_position",
    "num_prompt_tokens",
    "flags",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
SAMPLING_COLUMNS = RECORD_COLUMNS[2:]
RECORD_WIDTH = len(RECORD_COLUMNS)
#: Columns that hold the bits of a float32.
FLOAT_COLUMNS = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")

#: In "flags": the row's entries of `ProcessorState` are this request's own; it has allowed_token_ids.
HAS_PROCESSOR_STATE = 1
HAS_ALLOWED_IDS = 2


class Unpacked(NamedTuple):
    """A step's inputs on the device; arrays are int32 views of the packed buffer."""

    num_tokens: Any
    num_seqs: Any
    num_sampled: Any
    rows: Any  # [S]
    cu_tokens: Any  # [S + 1], constant past num_seqs
    token_ids: Any  # [T], LAST_SAMPLED where the row's last token is meant
    updates: Updates


class Updates(NamedTuple):
    """Writes to the persistent rows."""

    num_block_updates: Any
    num_row_records: Any
    block_updates: Any  # [3, U]: row, column, block id
    row_records: Any  # [N, RECORD_WIDTH]


def row_record(init: RowInit) -> list[int]:
    """The int32 fields of one row record, in the order of RECORD_COLUMNS."""
    p = init.sampling_params
    seed = p.seed or 0
    floats = np.array([getattr(p, name) for name in FLOAT_COLUMNS], np.float32).view(np.int32).tolist()
    temperature, top_p, min_p, *penalties = floats
    min_position = init.num_prompt_tokens + p.min_tokens if p.min_tokens else 0
    words = np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], np.uint32).view(np.int32).tolist()
    flags = 0
    if has_processor_state(init):
        flags = HAS_PROCESSOR_STATE | (HAS_ALLOWED_IDS if p.allowed_token_ids else 0)
    before = [init.row, init.num_computed_tokens, temperature, max(p.top_k, 0), top_p, min_p, *words]
    return [*before, min_position, init.num_prompt_tokens, flags, *penalties]


def has_processor_state(init: RowInit) -> bool:
    """Whether the request has ids of its own on the device, beside the columns of its record."""
    p = init.sampling_params
    if p.thinking_token_budget is not None:
        return True
    lists = (p.logit_bias, p.allowed_token_ids, init.bad_words_token_ids, p.logprob_token_ids, init.processor_values)
    return any(lists)


@dataclass(frozen=True)
class PackedLayout:
    """Offsets of one bucket's buffer. Capacities of the deltas are fixed; `UpdateLayout` carries what overflows."""

    num_tokens: int
    num_seqs: int
    max_block_updates: int
    max_row_records: int

    @classmethod
    def for_bucket(cls, bucket: ForwardBucket, block_size: int) -> PackedLayout:
        chunk_blocks = 0 if bucket.decode_only else bucket.num_tokens // block_size
        return cls(
            num_tokens=bucket.num_tokens,
            num_seqs=bucket.num_seqs,
            max_block_updates=chunk_blocks + bucket.num_seqs + 16,
            max_row_records=min(bucket.num_seqs, 8 if bucket.decode_only else 128),
        )

    @property
    def size(self) -> int:
        return self._records + self.max_row_records * RECORD_WIDTH

    @property
    def _rows(self) -> int:
        return len(_HEADER)

    @property
    def _cu(self) -> int:
        return self._rows + self.num_seqs

    @property
    def _tokens(self) -> int:
        return self._cu + self.num_seqs + 1

    @property
    def _updates(self) -> int:
        return self._tokens + self.num_tokens

    @property
    def _records(self) -> int:
        return self._updates + 3 * self.max_block_updates

    def fits(self, s: SchedulerOutput) -> bool:
        """Whether the step's deltas fit; otherwise they must be written ahead of it."""
        return len(s.block_ids) <= self.max_block_updates and len(s.new_rows) <= self.max_row_records

    def pack(self, s: SchedulerOutput, *, with_updates: bool = True) -> np.ndarray:
        """A new int32 buffer [size]. It must not change until the step has run, so every step gets its own."""
        buf = np.empty(self.size, np.int32)
        num_seqs, num_tokens = len(s.rows), len(s.token_ids)
        num_updates = len(s.block_ids) if with_updates else 0
        num_records = len(s.new_rows) if with_updates else 0
        buf[: len(_HEADER)] = (num_tokens, num_seqs, s.num_sampled, num_updates, num_records)
        buf[self._rows : self._rows + num_seqs] = s.rows
        cu = buf[self._cu : self._tokens]
        cu[: num_seqs + 1] = [0, *accumulate(s.num_scheduled_tokens)]
        cu[num_seqs + 1 :] = num_tokens
        # Half as long as numpy's assignment of a list.
        struct.pack_into(f"{num_tokens}i", buf.data, buf.itemsize * self._tokens, *s.token_ids)
        if num_updates:
            _fill_updates(buf[self._updates : self._records], self.max_block_updates, s, slice(0, num_updates))
        if num_records:
            records = buf[self._records :].reshape(self.max_row_records, RECORD_WIDTH)
            records[:num_records] = [row_record(r) for r in s.new_rows]
        return buf

    def unpack(self, packed: Any) -> Unpacked:
        """Slices of the traced (or numpy) buffer."""
        h = {name: packed[i] for i, name in enumerate(_HEADER)}
        return Unpacked(
            num_tokens=h["num_tokens"],
            num_seqs=h["num_seqs"],
            num_sampled=h["num_sampled"],
            rows=packed[self._rows : self._cu],
            cu_tokens=packed[self._cu : self._tokens],
            token_ids=packed[self._tokens : self._updates],
            updates=Updates(
                h["num_block_updates"],
                h["num_row_records"],
                packed[self._updates : self._records].reshape(3, self.max_block_updates),
                packed[self._records :].reshape(self.max_row_records, RECORD_WIDTH),
            ),
        )


@dataclass(frozen=True)
class UpdateLayout:
    """The buffer of `write_rows`: row records and block updates that did not fit a step's own buffer."""

    max_block_updates: int = 4096
    max_row_records: int = 64

    @property
    def size(self) -> int:
        return 2 + 3 * self.max_block_updates + self.max_row_records * RECORD_WIDTH

    def pack(self, s: SchedulerOutput) -> list[np.ndarray]:
        """As many buffers as the step's deltas need. All row records come before any block update."""
        buffers = []
        for start in range(0, len(s.new_rows), self.max_row_records):
            records = [row_record(r) for r in s.new_rows[start : start + self.max_row_records]]
            buf = self._empty(0, len(records))
            buf[2 + 3 * self.max_block_updates :].reshape(-1, RECORD_WIDTH)[: len(records)] = records
            buffers.append(buf)
        for start in range(0, len(s.block_ids), self.max_block_updates):
            part = slice(start, min(start + self.max_block_updates, len(s.block_ids)))
            buf = self._empty(part.stop - part.start, 0)
            _fill_updates(buf[2 : 2 + 3 * self.max_block_updates], self.max_block_updates, s, part)
            buffers.append(buf)
        return buffers

    def _empty(self, num_updates: int, num_records: int) -> np.ndarray:
        buf = np.empty(self.size, np.int32)
        buf[:2] = (num_updates, num_records)
        return buf

    def unpack(self, packed: Any) -> Updates:
        end = 2 + 3 * self.max_block_updates
        return Updates(
            packed[0],
            packed[1],
            packed[2:end].reshape(3, self.max_block_updates),
            packed[end:].reshape(self.max_row_records, RECORD_WIDTH),
        )


def _fill_updates(buf: np.ndarray, capacity: int, s: SchedulerOutput, part: slice) -> None:
    table = buf.reshape(3, capacity)
    n = part.stop - part.start
    table[0, :n] = s.block_rows[part]
    table[1, :n] = s.block_columns[part]
    table[2, :n] = s.block_ids[part]
