"""Text that arrives in pieces, for parsers that are generators.

A parser reads with `yield from` and is suspended where the text so far does not decide how to go on. What it reads
depends on the text alone, never on where the text was cut.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
#: A read that may have to wait for more text.
Reading = Generator[None, None, T]

_SPACES = re.compile(r"[ \t\r\n]*")


@functools.cache
def _any_of(tags: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tags)) or "(?!)")  # of no tags: nothing


class TextInput:
    """What has arrived of a text and was not read yet."""

    def __init__(self):
        self._text = ""
        self._at = 0
        self._ended = False
        self._recorded: list[str] = []
        self._is_recording = False

    def feed(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        """There is no more text to come."""
        self._ended = True

    def start_recording(self) -> None:
        """Keeps what is read from here on."""
        self._recorded.clear()
        self._is_recording = True

    def stop_recording(self) -> str:
        """What was read since `start_recording`."""
        self._is_recording = False
        text = "".join(self._recorded)
        self._recorded.clear()
        return text

    def take(self, length: int) -> str:
        """Reads characters that have arrived."""
        piece = self._text[self._at : self._at + length]
        self._at += length
        if self._is_recording:
            self._recorded.append(piece)
        return piece

    def has(self, length: int) -> Reading[bool]:
        """Whether `length` more characters come."""
        while len(self._text) - self._at < length:
            if self._ended:
                return False
            yield
        return True

    def peek(self) -> Reading[str]:
        """The next character, unread; "" at the end."""
        has_more = yield from self.has(1)
        return self._text[self._at] if has_more else ""

    def spaces(self) -> Reading[str]:
        """Reads all white space that comes next."""
        pieces: list[str] = []
        while True:
            match = _SPACES.match(self._text, self._at)
            pieces.append(self.take(len(match.group()) if match else 0))
            if self._at < len(self._text) or self._ended:
                return "".join(pieces)
            yield

    def next_tag(self, *tags: str) -> Reading[str]:
        """The one of `tags` that comes next, unread; "" if none does."""
        longest = max(map(len, tags))
        while True:
            rest = self._text[self._at : self._at + longest]
            for tag in tags:
                if rest.startswith(tag):
                    return tag
            if self._ended or not any(tag.startswith(rest) for tag in tags):
                return ""
            yield

    def copy_until_tag(self, tags: tuple[str, ...], emit: Callable[[str], object]) -> Reading[str]:
        """Reads up to the first of `tags` and gives that to `emit` as it arrives. What may be the beginning of a tag is
        held back until it is decided.

        Args:
            tags: None of them may begin inside another one.

        Returns:
            The tag, unread; "" at the end of the text.
        """
        pattern = _any_of(tags)
        while True:
            if match := pattern.search(self._text, self._at):
                emit(self.take(match.start() - self._at))
                return match.group()
            held = 0 if self._ended else self._len_of_begun_tag(tags)
            emit(self.take(len(self._text) - self._at - held))
            if self._ended:
                return ""
            yield

    def copy_until_char(self, chars: re.Pattern[str], emit: Callable[[str], object]) -> Reading[str]:
        """Reads up to the first match of a pattern for one character and gives that to `emit` as it arrives.

        Returns:
            The character, unread; "" at the end of the text.
        """
        while True:
            match = chars.search(self._text, self._at)
            emit(self.take((match.start() if match else len(self._text)) - self._at))
            if match:
                return match.group()
            if self._ended:
                return ""
            yield

    def _len_of_begun_tag(self, tags: tuple[str, ...]) -> int:
        """Length of the longest end of the unread text that begins one of `tags`."""
        longest = min(len(self._text) - self._at, max(map(len, tags), default=1) - 1)
        ends = (self._text[len(self._text) - length :] for length in range(longest, 0, -1))
        return next((len(end) for end in ends if any(tag.startswith(end) for tag in tags)), 0)
