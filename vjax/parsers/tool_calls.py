"""`ToolParser` and its streaming form: finds calls in a text; the formats of calls are subclasses in other files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from vjax.errors import VjaxValidationError
from vjax.parsers.delta_stream import DeltaStream
from vjax.parsers.deltas import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ToolCall,
    join_deltas,
    make_tool_call_id,
)
from vjax.parsers.text_input import Reading, TextInput


class Malformed(Exception):
    """Raised by `ToolParser.read_call`: this is no call."""


class ExtractedToolCalls(NamedTuple):
    """The text around the calls (None if there is none), and the calls."""

    content: str | None
    tool_calls: list[ToolCall]


class ToolParser(ABC):
    """Finds the tool calls in a model's text. Keeps no state: one parser serves any number of texts.

    Content is the text outside of calls as it stands, without white space that only separates calls. A malformed or
    unfinished call is content, with its markup; it raises nothing and does not affect other calls. Arguments are the
    model's own JSON text where the format is JSON.

    Where a model's tags are special tokens, sample with skip_special_tokens=False.

    Args:
        tools: What the model was given: {"type": "function", "function": {"name": ..., "parameters": schema}}, or the
            inner dicts. Formats without types take those of arguments from there.

    Raises:
        VjaxValidationError: `tools` is no list of dicts.
    """

    #: Texts with which a call begins; none of them begins inside another one.
    openers: ClassVar[tuple[str, ...]]
    #: Text that may follow a call and is dropped there.
    closer: ClassVar[str]

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None = None):
        if not isinstance(tools, (list, tuple, type(None))) or not all(isinstance(t, Mapping) for t in tools or ()):
            raise VjaxValidationError(
                f"tools={tools!r:.100} must be a list of dicts such as "
                '{"type": "function", "function": {"name": ..., "parameters": {...}}}.',
                parameter="tools",
                value=tools,
            )
        functions = [tool.get("function", tool) for tool in tools or ()]
        self.functions = {f["name"]: f for f in functions if isinstance(f, Mapping) and isinstance(f.get("name"), str)}

    def extract_tool_calls(self, text: str) -> ExtractedToolCalls:
        """Content and tool calls of a whole text.

        Raises:
            VjaxValidationError: It is not a str.
        """
        stream = self.stream()
        message = join_deltas([stream.feed(text), stream.finish()])
        return ExtractedToolCalls(message.content, message.tool_calls)

    def stream(self) -> ToolCallStream:
        """A parser for one text that arrives in pieces: `feed` them, then `finish`."""
        return ToolCallStream(self)

    @abstractmethod
    def read_call(self, text: TextInput, opener: str, call: CallWriter) -> Reading[None]:
        """Reads one call, whose opener was read, and writes it to `call`. `closer` is left unread.

        Raises:
            Malformed: This is no call, or the text ends in it. What comes next is searched for calls again.
        """


class CallWriter:
    """Where `read_call` writes a call: its name once, then fragments of its arguments."""

    def __init__(self, index: int):
        self.index = index
        #: Whether anybody has seen the call.
        self.is_given = False
        self._name: str | None = None
        self._fragments: list[str] = []

    def begin(self, name: str) -> None:
        self._name = name

    def add_arguments(self, fragment: str) -> None:
        self._fragments.append(fragment)

    def take_delta(self) -> DeltaToolCall | None:
        """What is new since the last one; None if nothing is."""
        arguments = "".join(self._fragments)
        self._fragments.clear()
        if self._name is None or (self.is_given and not arguments):
            return None
        if self.is_given:
            return DeltaToolCall(self.index, DeltaFunctionCall(arguments=arguments))
        self.is_given = True
        return DeltaToolCall(self.index, DeltaFunctionCall(self._name, arguments), make_tool_call_id(), "function")


class ToolCallStream(DeltaStream):
    """The streaming form of a tool parser: content at once, the name of a call when its arguments begin, arguments as
    they arrive. `vjax.parsers.deltas.join_deltas` of all deltas is what `extract_tool_calls` gives."""

    def __init__(self, parser: ToolParser):
        super().__init__()
        self._parser = parser
        self._num_calls = 0
        #: The call that is being read.
        self._call: CallWriter | None = None

    def _parse(self) -> Reading[None]:
        spaces = ""  # between two calls
        while opener := (yield from self._input.copy_until_tag(self._parser.openers, self._add_content)):
            is_call = yield from self._parse_call(opener, spaces)
            spaces = (yield from self._after_call()) if is_call else ""

    def _parse_call(self, opener: str, spaces: str) -> Reading[bool]:
        """Whether there was a call; else its text, and the spaces before it, became content."""
        call = self._call = CallWriter(self._num_calls)
        self._input.start_recording()
        self._input.take(len(opener))
        try:
            yield from self._parser.read_call(self._input, opener, call)
            is_call = True
        except Malformed:
            is_call = False
        self._call = None
        text = self._input.stop_recording()
        if is_call:
            self._give(call)
        else:
            self._add_content(spaces + text)
            if call.is_given:
                self._new_calls.append(DeltaToolCall(call.index, DeltaFunctionCall(), cancelled=True))
        if call.is_given:
            self._num_calls += 1
        return is_call

    def _after_call(self) -> Reading[str]:
        """Reads the closer and the white space around it. Spaces are content where more content follows, and returned
        where a call does, since it may turn out malformed."""
        spaces = yield from self._input.spaces()
        if (yield from self._input.next_tag(self._parser.closer)):
            self._input.take(len(self._parser.closer))
            spaces = yield from self._input.spaces()
        if (yield from self._input.next_tag(*self._parser.openers)):
            return spaces
        if (yield from self._input.peek()):
            self._add_content(spaces)
        return ""

    def _take_delta(self) -> DeltaMessage:
        if self._call is not None:
            self._give(self._call)
        return super()._take_delta()

    def _give(self, call: CallWriter) -> None:
        if (delta := call.take_delta()) is not None:
            self._new_calls.append(delta)
