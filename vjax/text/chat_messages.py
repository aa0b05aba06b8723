"""Messages of a conversation: checked, and brought into the form that chat templates read, as vLLM does it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from vjax.errors import VjaxValidationError

#: How a template takes text: as a string, or as OpenAI's list of parts.
ContentForm = Literal["string", "openai"]

_EXAMPLE = '{"role": "user", "content": "Hello"}'
_EXAMPLE_CALL = '{"type": "function", "function": {"name": "f", "arguments": "{}"}}'


def template_messages(messages: Sequence[Any], form: ContentForm) -> list[dict[str, Any]]:
    """The messages as a template reads them; those given are not changed.

    Content becomes a string (parts are joined with newlines) or, in the form "openai", a list of text parts; that of a
    tool is always a string. Arguments of tool calls become dicts, and an empty list of calls goes away. Reasoning of an
    assistant is there under both names in use, "reasoning" and "reasoning_content".

    Args:
        messages: As `LLM.chat` takes them.

    Raises:
        VjaxValidationError: There are none, or one of them is malformed; names its index.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise _error(f"a conversation must be a non-empty list of messages such as {_EXAMPLE}", messages)
    return [_template_message(f"messages[{i}]", message, form) for i, message in enumerate(messages)]


def _template_message(where: str, message: Any, form: ContentForm) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _error(f"{where} is a {type(message).__name__}; a message is a dict such as {_EXAMPLE}", message)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise _error(f'{where} needs a "role" such as "system", "user", "assistant" or "tool", not {role!r}', message)
    result = dict(message)
    if role == "assistant":
        _normalize_assistant(where, result)
    texts = _content_texts(where, role, result)
    if form == "string" or role == "tool":
        result["content"] = "\n".join(texts)
    else:
        result["content"] = [{"type": "text", "text": text} for text in texts]
    return result


def _normalize_assistant(where: str, message: dict[str, Any]) -> None:
    calls = message.pop("tool_calls", None)
    if calls is not None and not isinstance(calls, (list, tuple)):
        raise _error(f"{where}: tool_calls is a {type(calls).__name__}; pass a list such as [{_EXAMPLE_CALL}]", calls)
    if calls:
        message["tool_calls"] = [_template_call(f"{where}: tool_calls[{i}]", call) for i, call in enumerate(calls)]
    reasoning = message.get("reasoning_content") if message.get("reasoning") is None else message["reasoning"]
    if reasoning is not None:
        message["reasoning"] = message["reasoning_content"] = reasoning


def _template_call(where: str, call: Any) -> dict[str, Any]:
    """A tool call with its arguments as a dict; none are an empty one."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _error(f"{where} is {call!r:.100}; a call is a dict such as {_EXAMPLE_CALL}", call)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as e:
            raise _error(f"{where}: the arguments {arguments!r:.100} are not JSON ({e})", call) from e
    if not isinstance(arguments, Mapping):
        kind = type(arguments).__name__
        raise _error(f"{where}: the arguments are a {kind}; pass a JSON object, as text or as a dict", call)
    return {**call, "function": {**function, "arguments": dict(arguments)}}


def _content_texts(where: str, role: str, message: Mapping[str, Any]) -> list[str]:
    """The texts of a message's content; none where an assistant only calls tools or only thinks."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    if isinstance(content, (list, tuple)):
        return [_part_text(f"{where}: content[{i}]", part) for i, part in enumerate(content)]
    if content is not None:
        raise _error(f"{where}: content is a {type(content).__name__}; pass a string or a list of text parts", message)
    if role == "assistant" and ("tool_calls" in message or message.get("reasoning") is not None):
        return []
    instead = ", tool_calls or reasoning" if role == "assistant" else ""
    raise _error(f'{where} (role {role!r}) needs a "content" (a string or a list of text parts){instead}', message)


def _part_text(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text_part = '{"type": "text", "text": "..."}'
    raise _error(f"{where}: a content part of type {kind!r} is not supported; only {text_part} is", part)


def _error(text: str, value: object) -> VjaxValidationError:
    return VjaxValidationError(f"{text}.", parameter="messages", value=value)
