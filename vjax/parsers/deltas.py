"""What parsers give: tool calls as OpenAI's API has them, and deltas of a message that join to the whole.

Names are vLLM's. `dataclasses.asdict` of a `ToolCall` is an entry of a message's "tool_calls".
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field


def make_tool_call_id() -> str:
    """A fresh id for a tool call, which a message of role "tool" names as its tool_call_id."""
    return f"chatcmpl-tool-{uuid.uuid4().hex}"


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A function's name and its arguments, a JSON object as text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that the model asks for. Calls with equal functions are equal: ids are made up here."""

    function: FunctionCall
    id: str = field(default_factory=make_tool_call_id, compare=False)
    type: str = "function"


@dataclass(slots=True)
class DeltaFunctionCall:
    """More of a call: the name comes whole and once, the arguments in fragments."""

    name: str | None = None
    arguments: str | None = None


@dataclass(slots=True)
class DeltaToolCall:
    """More of the tool call number `index` of the message. The first one of a call has its id, type and name.

    `cancelled`: the call turned out malformed after parts of it were given. Its text follows as content, and the call
    is to be forgotten.
    """

    index: int
    function: DeltaFunctionCall
    id: str | None = None
    type: str | None = None
    cancelled: bool = False


@dataclass(slots=True)
class DeltaMessage:
    """More of a message; false where there is nothing new."""

    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[DeltaToolCall] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.tool_calls)


@dataclass(frozen=True, slots=True)
class Message:
    """A whole message. Text that is empty is None."""

    content: str | None
    reasoning: str | None
    tool_calls: list[ToolCall]


def join_deltas(deltas: Iterable[DeltaMessage]) -> Message:
    """The message that deltas add up to; cancelled calls are left out."""
    content: list[str] = []
    reasoning: list[str] = []
    names: dict[int, tuple[str, str]] = {}  # index -> id, name
    arguments: dict[int, list[str]] = {}
    for delta in deltas:
        content.append(delta.content or "")
        reasoning.append(delta.reasoning or "")
        for call in delta.tool_calls:
            if call.cancelled:
                del names[call.index]
                continue
            if call.id is not None and call.function.name is not None:
                names[call.index] = call.id, call.function.name
            arguments.setdefault(call.index, []).append(call.function.arguments or "")
    calls = [ToolCall(FunctionCall(name, "".join(arguments[i])), id_) for i, (id_, name) in sorted(names.items())]
    return Message("".join(content) or None, "".join(reasoning) or None, calls)
