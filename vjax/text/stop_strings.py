"""Finds stop strings in text that grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopMatch(NamedTuple):
    """A stop string found. Offsets are relative to the text just added: `start` is negative if it began before that."""

    string: str
    start: int
    end: int


class StopStrings:
    """Searches each addition, together with as much older text as a match can reach back into.

    The match that completes first wins; of those that complete at the same character, the first in the list.
    """

    __slots__ = ("_strings", "_tail", "_tail_length", "max_length")

    def __init__(self, strings: Sequence[str]):
        """
        Args:
            strings: At least one, none empty.
        """
        self._strings = tuple(strings)
        self.max_length = max(map(len, strings))
        self._tail_length = self.max_length - 1
        self._tail = ""

    def push(self, text: str, search: bool = True) -> StopMatch | None:
        """Adds text; `search` False: no match may complete in it."""
        old = len(self._tail)
        buffer = self._tail + text
        self._tail = buffer[-self._tail_length :] if self._tail_length else ""
        if not search:
            return None
        best: StopMatch | None = None
        for string in self._strings:
            start = buffer.find(string, max(0, old - len(string) + 1))
            if start >= 0 and (best is None or start + len(string) - old < best.end):
                best = StopMatch(string, start - old, start + len(string) - old)
        return best
