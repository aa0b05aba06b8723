"""The state of requests in their grammars, and the masks of the tokens that they may draw next."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vjax.structured.reasoning import ReasoningTags

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher


#: More threads fill the masks of 64 rows no sooner, and take time from the one that sends steps to the device.
_THREADS = max(1, min(8, (os.cpu_count() or 1) // 2))


class GrammarMatcher:
    """Where one completion is in its grammar.

    It knows nothing of steps: `follow` takes the tokens as they are known, so that its state is theirs after a
    preemption too.

    Args:
        matcher: At the beginning of a text.
        tags: Those of a model that may reason first: the grammar holds from the end of the reasoning on.
        take_back: Given what `release` leaves.

    Attributes:
        is_reasoning: The grammar does not hold yet: every token may come next.
    """

    __slots__ = ("_num_seen", "_tags", "_take_back", "is_reasoning", "matcher")

    def __init__(
        self,
        matcher: LLMatcher,
        tags: ReasoningTags | None = None,
        take_back: Callable[[LLMatcher], None] = lambda matcher: None,
    ):
        self.matcher = matcher
        self.is_reasoning = tags is not None
        self._tags = tags
        self._take_back = take_back
        #: Tokens of the sequence that need not be looked at again.
        self._num_seen = 0

    def copy(self) -> GrammarMatcher:
        """Another one; neither has followed anything yet."""
        assert self._num_seen == 0
        return GrammarMatcher(self.matcher.deep_copy(), self._tags, self._take_back)

    def release(self) -> None:
        """Ends its use: nothing else may be called afterwards."""
        self._take_back(self.matcher)
        del self.matcher

    def follow(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Takes in what is new of a sequence, of which earlier calls had a prefix."""
        first = max(self._num_seen, num_prompt_tokens)
        if self.is_reasoning:
            assert self._tags is not None
            if self._num_seen == 0 and self._tags.has_ended(token_ids[:num_prompt_tokens]):
                end = first
            else:
                end = self._tags.end_of_reasoning(token_ids, first)
            self.is_reasoning = end is None
            first = len(token_ids) if end is None else end
        self._num_seen = len(token_ids)
        if first < self._num_seen and not self.matcher.is_stopped():
            self.matcher.consume_tokens(token_ids[first:])  # pyright: ignore[reportArgumentType]

    @property
    def error(self) -> str:
        """Why it cannot go on: a limit of llguidance was reached. Empty while it can."""
        return self.matcher.get_error() if self.matcher.is_error() else ""


class MaskFiller:
    """Moves the matchers of a batch on and fills their masks, with llguidance's threads."""

    def __init__(self) -> None:
        self._executor: LLExecutor | None = None

    def follow(self, sequences: Iterable[tuple[GrammarMatcher, Sequence[int], int]]) -> None:
        """As `GrammarMatcher.follow` with the rest of each item; where it is one token, as in a step, in threads."""
        single = []
        for matcher, token_ids, num_prompt_tokens in sequences:
            if matcher.is_reasoning or not num_prompt_tokens <= matcher._num_seen == len(token_ids) - 1:
                matcher.follow(token_ids, num_prompt_tokens)
                continue
            matcher._num_seen += 1
            if not matcher.matcher.is_stopped():
                single.append((matcher.matcher, token_ids[-1]))
        if single:
            self._threads().consume_token_par(single)

    def fill(self, mask: np.ndarray, matchers: Sequence[tuple[int, GrammarMatcher]]) -> None:
        """Writes for each (row, matcher) which tokens may come next: all of them while it reasons, and EOS alone after
        an error. Other rows keep what they have.

        Args:
            mask: i32 [R, mask_width(vocab_size)], contiguous; bit i % 32 of word i // 32 is id i.
        """
        assert mask.dtype == np.int32 and mask.flags.c_contiguous
        pairs = []
        for row, matcher in matchers:
            if matcher.is_reasoning:
                mask[row] = -1
            else:
                pairs.append((matcher.matcher, row))
        if pairs:
            self._threads().unsafe_compute_mask_ptr(pairs, mask.ctypes.data, mask.shape[1] * 4, len(mask))  # pyright: ignore[reportArgumentType]

    def _threads(self) -> LLExecutor:
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor(num_threads=_THREADS)
        return self._executor
