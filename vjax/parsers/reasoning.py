"""`ReasoningParser` and its streaming form: tells what a model thinks from what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from vjax.errors import VjaxValidationError
from vjax.parsers.delta_stream import DeltaStream
from vjax.parsers.deltas import join_deltas
from vjax.parsers.text_input import Reading

_START, _END, _TOOL_CALL = "<think>", "</think>", "<tool_call>"


class ExtractedReasoning(NamedTuple):
    """What stands before the end of thinking and after it, tags left out; None where there is nothing."""

    reasoning: str | None
    content: str | None


class ReasoningParser:
    """`<think>REASONING</think>CONTENT`. Keeps no state: one parser serves any number of texts.

    The first tag may be missing, because templates put it into the prompt. A text without the second one was cut while
    the model thought: all of it is reasoning.

    Args:
        chat_template_kwargs: What `LLM.chat` was given.

    Raises:
        VjaxValidationError: `chat_template_kwargs` is no mapping.
    """

    #: Whether a tool call ends the reasoning where the model leaves the second tag out.
    tool_call_ends_reasoning = False

    def __init__(self, chat_template_kwargs: Mapping[str, Any] | None = None):
        if not isinstance(chat_template_kwargs, (Mapping, type(None))):
            raise VjaxValidationError(
                f"chat_template_kwargs={chat_template_kwargs!r:.100} must be a dict, the one that LLM.chat was given.",
                parameter="chat_template_kwargs",
                value=chat_template_kwargs,
            )
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    @property
    def starts_thinking(self) -> bool:
        """Whether a text that does not begin with <think> is reasoning."""
        return True

    def extract_reasoning(self, text: str) -> ExtractedReasoning:
        """Reasoning and content of a whole text.

        Raises:
            VjaxValidationError: It is not a str.
        """
        stream = self.stream()
        message = join_deltas([stream.feed(text), stream.finish()])
        return ExtractedReasoning(message.reasoning, message.content)

    def stream(self) -> ReasoningStream:
        """A parser for one text that arrives in pieces: `feed` them, then `finish`."""
        return ReasoningStream(self)


class DeepSeekR1ReasoningParser(ReasoningParser):
    """DeepSeek-R1 and its distilled models."""


class Qwen3ReasoningParser(ReasoningParser):
    """Qwen3 and later. With `chat_template_kwargs={"enable_thinking": False}` a text is content unless it begins with
    <think>. A tool call in the reasoning, JSON or XML, ends it and is content."""

    tool_call_ends_reasoning = True

    @property
    def starts_thinking(self) -> bool:
        return bool(self.chat_template_kwargs.get("enable_thinking", True))


class ReasoningStream(DeltaStream):
    """The streaming form of a reasoning parser: everything at once but the beginnings of tags. Its content can be fed
    to a tool parser's stream."""

    def __init__(self, parser: ReasoningParser):
        super().__init__()
        self._parser = parser

    def _parse(self) -> Reading[None]:
        spaces = yield from self._input.spaces()
        if (yield from self._input.next_tag(_START)):
            self._input.take(len(_START))
            yield from self._parse_reasoning()
        elif self._parser.starts_thinking:
            self._add_reasoning(spaces)
            yield from self._parse_reasoning()
        else:
            self._add_content(spaces)
        yield from self._input.copy_until_tag((), self._add_content)

    def _parse_reasoning(self) -> Reading[None]:
        """Reads to the end of the reasoning."""
        tags = (_END, _TOOL_CALL) if self._parser.tool_call_ends_reasoning else (_END,)
        while (tag := (yield from self._input.copy_until_tag(tags, self._add_reasoning))) == _TOOL_CALL:
            mention = self._input.take(len(tag)) + (yield from self._input.spaces())
            if (yield from self._input.next_tag("{", "<function=")):
                self._add_content(mention)
                return
            self._add_reasoning(mention)
        self._input.take(len(tag))
