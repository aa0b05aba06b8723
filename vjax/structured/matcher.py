"""The state of requests in their grammars, and the masks of the tokens that they may draw next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher


class GrammarMatcher:
    """Where one completion is in its grammar.

    It knows nothing of steps: `follow` takes the tokens as they are known, so that its state is theirs after a
    preemption too.
    """

    __slots__ = ("_num_followed", "matcher")

    def __init__(self, matcher: LLMatcher):
        self.matcher = matcher
        self._num_followed = 0

    def follow(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Takes in what is new of a sequence, of which earlier calls had a prefix."""
        new = token_ids[num_prompt_tokens + self._num_followed :]
        if new and not self.matcher.is_stopped():
            self.matcher.consume_tokens(new)  # pyright: ignore[reportArgumentType]
        self._num_followed += len(new)

    @property
    def error(self) -> str:
        """Why it cannot go on: a limit of llguidance was reached. Empty while it can."""
        return self.matcher.get_error() if self.matcher.is_error() else ""


class MaskFiller:
    """Fills masks with llguidance's threads."""

    def __init__(self) -> None:
        self._executor: LLExecutor | None = None

    def fill(self, mask: np.ndarray, matchers: Sequence[tuple[int, GrammarMatcher]]) -> None:
        """Writes for each (row, matcher) which tokens may come next; all others keep what they have. A matcher with an
        error allows EOS alone.

        Args:
            mask: i32 [R, mask_width(vocab_size)], contiguous; bit i % 32 of word i // 32 is id i.
        """
        if not matchers:
            return
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor()
        assert mask.dtype == np.int32 and mask.flags.c_contiguous
        pairs = [(m.matcher, row) for row, m in matchers]
        self._executor.unsafe_compute_mask_ptr(pairs, mask.ctypes.data, mask.shape[1] * 4, len(mask))  # pyright: ignore[reportArgumentType]
