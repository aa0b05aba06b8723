"""Log probabilities as users get them: one record per token, or flat lists for all tokens together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload


@dataclass(slots=True)
class Logprob:
    """Log probability of one token, or its logit, as the engine's logprobs_mode says."""

    logprob: float
    #: How many tokens are at least as probable, from 1; None for those of `logprob_token_ids`.
    rank: int | None = None
    #: None with detokenize=False.
    decoded_token: str | None = None


@dataclass(slots=True)
class FlatLogprobs(Sequence[dict[int, Logprob]]):
    """What `logprobs` and `prompt_logprobs` are with flat_logprobs=True: six lists of numbers and texts, however many
    tokens there are, instead of a dict per token and a record per entry.

    Entry j of the last four lists belongs to position i if start_indices[i] <= j < end_indices[i]. As in vLLM a
    position holds its token first and then all of the most probable ones, so that the token is there twice if it is one
    of them, and each position has logprobs + 1 entries. As a sequence it is the dicts, made when they are asked for;
    the one of a prompt's first token is empty.
    """

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)

    def append(self, entry: Mapping[int, Logprob] | None) -> None:
        """Adds a position; None is one without entries."""
        entry = entry or {}
        values = entry.values()
        self.append_fast(
            entry, [v.logprob for v in values], [v.rank for v in values], [v.decoded_token for v in values]
        )

    def append_fast(
        self,
        token_ids: Iterable[int],
        logprobs: Iterable[float],
        ranks: Iterable[int | None],
        decoded_tokens: Iterable[str | None],
    ) -> None:
        """Adds a position whose entries are these lists, of one length."""
        self.start_indices.append(len(self.token_ids))
        self.token_ids += token_ids
        self.logprobs += logprobs
        self.ranks += ranks
        self.decoded_tokens += decoded_tokens
        self.end_indices.append(len(self.token_ids))

    def extend(self, entries: Iterable[Mapping[int, Logprob] | None]) -> None:
        """Adds positions, from another `FlatLogprobs` without making dicts."""
        if not isinstance(entries, FlatLogprobs):
            for entry in entries:
                self.append(entry)
            return
        shift = len(self.token_ids)
        self.start_indices += [i + shift for i in entries.start_indices]
        self.end_indices += [i + shift for i in entries.end_indices]
        self.token_ids += entries.token_ids
        self.logprobs += entries.logprobs
        self.ranks += entries.ranks
        self.decoded_tokens += entries.decoded_tokens

    def __len__(self) -> int:
        return len(self.start_indices)

    @overload
    def __getitem__(self, index: int) -> dict[int, Logprob]: ...
    @overload
    def __getitem__(self, index: slice) -> FlatLogprobs: ...
    def __getitem__(self, index: int | slice) -> dict[int, Logprob] | FlatLogprobs:
        if not isinstance(index, slice):
            entry: dict[int, Logprob] = {}
            for j in range(self.start_indices[index], self.end_indices[index]):
                entry.setdefault(self.token_ids[j], Logprob(self.logprobs[j], self.ranks[j], self.decoded_tokens[j]))
            return entry
        part = FlatLogprobs()
        for start, end in zip(self.start_indices[index], self.end_indices[index], strict=True):
            span = slice(start, end)
            part.append_fast(self.token_ids[span], self.logprobs[span], self.ranks[span], self.decoded_tokens[span])
        return part
