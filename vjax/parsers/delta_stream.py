"""`DeltaStream`: what the streaming forms of all parsers have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

from vjax.errors import VjaxValidationError
from vjax.parsers.deltas import DeltaMessage, DeltaToolCall
from vjax.parsers.text_input import Reading, TextInput


class DeltaStream(ABC):
    """Takes a text piece by piece and gives what is new of the message. One object parses one text."""

    def __init__(self):
        self._input = TextInput()
        self._new_content: list[str] = []
        self._new_reasoning: list[str] = []
        self._new_calls: list[DeltaToolCall] = []
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

    def _add_content(self, text: str) -> None:
        self._new_content.append(text)

    def _add_reasoning(self, text: str) -> None:
        self._new_reasoning.append(text)

    def _advance(self) -> DeltaMessage:
        next(self._parsing, None)
        return self._take_delta()

    def _take_delta(self) -> DeltaMessage:
        """What is new since the last one."""
        content, reasoning = "".join(self._new_content), "".join(self._new_reasoning)
        delta = DeltaMessage(content or None, reasoning or None, self._new_calls)
        self._new_content, self._new_reasoning, self._new_calls = [], [], []
        return delta
