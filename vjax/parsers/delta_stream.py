"""`DeltaStream`: what the streaming forms of all parsers have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

from vjax.errors import VjaxValidationError
from vjax.parsers.deltas import DeltaMessage
from vjax.parsers.text_input import Reading, TextInput


class DeltaStream(ABC):
    """Takes a text piece by piece and gives what is new of the message. One object parses one text."""

    def __init__(self):
        self._input = TextInput()
        self._delta = DeltaMessage()
        self._parsing = self._parse()
        self._finished = False

    def feed(self, text: str) -> DeltaMessage:
        """What the next piece of the text adds to the message; the deltas depend on the pieces, their sum does not.

        Raises:
            VjaxValidationError: It is not a str.
            RuntimeError: After `finish`.
        """
        if not isinstance(text, str):
            raise VjaxValidationError(f"a text to parse must be a str, not {type(text).__name__}.", value=text)
        if self._finished:
            raise RuntimeError("this stream is finished; make a new one for another text")
        self._input.feed(text)
        return self._advance()

    def finish(self) -> DeltaMessage:
        """What was held back, because more text could have made a tag or a call of it. May be called again."""
        self._finished = True
        self._input.end()
        return self._advance()

    @abstractmethod
    def _parse(self) -> Reading[None]:
        """Reads `self._input` to its end."""

    def _content(self, text: str) -> None:
        if text:
            self._delta.content = (self._delta.content or "") + text

    def _reasoning(self, text: str) -> None:
        if text:
            self._delta.reasoning = (self._delta.reasoning or "") + text

    def _advance(self) -> DeltaMessage:
        next(self._parsing, None)
        delta, self._delta = self._delta, DeltaMessage()
        return delta
