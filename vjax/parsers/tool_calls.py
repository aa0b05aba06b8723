"""`ToolParser` and its streaming form: finds calls in a text; the formats of calls are subclasses in other files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from vjax.errors import VjaxValidationError
from vjax.parsers.delta_stream import DeltaStream
from vjax.parsers.deltas import DeltaFunctionCall, DeltaToolCall, ToolCall, join_deltas, make_tool_call_id
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

    def __init__(self, calls: list[DeltaToolCall], index: int):
        self.index = index
        self.begun: DeltaToolCall | None = None
        #: Of the delta that is being made.
        self.calls = calls

    def begin(self, name: str) -> None:
        self.begun = DeltaToolCall(self.index, DeltaFunctionCall(name, ""), make_tool_call_id(), "function")
        self.calls.append(self.begun)

    def add_arguments(self, fragment: str) -> None:
        if not fragment:
            return
        if not self.calls or self.calls[-1].index != self.index:
            self.calls.append(DeltaToolCall(self.index, DeltaFunctionCall(arguments="")))
        function = self.calls[-1].function
        function.arguments = (function.arguments or "") + fragment


class ToolCallStream(DeltaStream):
    """The streaming form of a tool parser: content at once, the name of a call when its arguments begin, arguments as
    they arrive. `vjax.parsers.deltas.join_deltas` of all deltas is what `extract_tool_calls` gives."""

    def __init__(self, parser: ToolParser):
        super().__init__()
        self._parser = parser
        self._num_calls = 0
        self._call: CallWriter | None = None

    def _parse(self) -> Reading[None]:
        spaces = ""  # between two calls
        while opener := (yield from self._input.copy_until_tag(self._parser.openers, self._content)):
            is_call = yield from self._parse_call(opener, spaces)
            spaces = (yield from self._after_call()) if is_call else ""

    def _parse_call(self, opener: str, spaces: str) -> Reading[bool]:
        """Whether there was a call; else its text, and the spaces before it, became content."""
        self._call = CallWriter(self._delta.tool_calls, self._num_calls)
        self._input.start_recording()
        self._input.take(len(opener))
        try:
            yield from self._parser.read_call(self._input, opener, self._call)
        except Malformed:
            self._cancel(self._call)
            self._content(spaces + self._input.stop_recording())
            return False
        else:
            self._input.stop_recording()
            self._num_calls += 1
            return True
        finally:
            self._call = None

    def _cancel(self, call: CallWriter) -> None:
        if call.begun is None:
            return
        if call.begun in call.calls:  # nobody has seen it
            call.calls.remove(call.begun)
        else:
            call.calls[:] = [c for c in call.calls if c.index != call.index]
            call.calls.append(DeltaToolCall(call.index, DeltaFunctionCall(), cancelled=True))
            self._num_calls += 1

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
            self._content(spaces)
        return ""

    def _advance(self):
        if self._call is not None:
            self._call.calls = self._delta.tool_calls
        return super()._advance()
