"""Conversations to prompts: checks the messages and renders the model's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vjax.errors import VjaxValidationError
from vjax.text.chat_template import iterates_over_content
from vjax.text.tokenizer import Tokenizer

#: Names that the renderer itself uses.
_RESERVED = {"messages", "template", "tokenize"}
_EXAMPLE = '{"role": "user", "content": "Hello"}'


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    /,
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: list[dict[str, Any]] | None = None,
    **template_kwargs: Any,
) -> str:
    """The prompt text of one conversation. Encode it with `add_special_tokens=False`: the template writes its own.

    Args:
        messages: Dicts with "role" and "content"; content is a string or a list of {"type": "text", "text": ...}, which
            is joined with newlines for templates that expect a string.
        chat_template: Jinja text or the name of one of the model's templates; None: the model's default.
        template_kwargs: Further variables that the template reads, such as enable_thinking.

    Raises:
        VjaxValidationError: A message is malformed, there is no template, it refuses the messages, or a name of
            `template_kwargs` is not free.
    """
    if taken := sorted(_RESERVED & template_kwargs.keys()):
        raise VjaxValidationError(
            f"chat_template_kwargs has the name {taken[0]!r}, which is not free for a template's variable; rename it.",
            parameter="chat_template_kwargs",
            value=template_kwargs,
        )
    template = tokenizer.get_chat_template(chat_template, has_tools=bool(tools))
    checked = validate_messages(messages)
    if not iterates_over_content(template):
        checked = [_with_string_content(message) for message in checked]
    text = tokenizer.apply_chat_template(
        checked,
        tokenize=False,
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        tools=tools,
        **template_kwargs,
    )
    assert isinstance(text, str)
    return text


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], /, **options: Any) -> dict[str, Any]:
    """The conversation as a prompt for generate: {"prompt": text, "prompt_token_ids": ids}. Options, errors: as
    `render_chat`."""
    text = render_chat(tokenizer, messages, **options)
    return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}


def validate_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages as dicts.

    Raises:
        VjaxValidationError: There are none, or one of them is malformed; names its index.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise _error(f"a conversation must be a non-empty list of messages such as {_EXAMPLE}", messages)
    for i, message in enumerate(messages):
        _validate_message(i, message)
    return [dict(message) for message in messages]


def _validate_message(i: int, message: Any) -> None:
    if not isinstance(message, Mapping):
        raise _error(f"messages[{i}] is a {type(message).__name__}; a message is a dict such as {_EXAMPLE}", message)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise _error(f'messages[{i}] needs a "role" such as "system", "user" or "assistant", not {role!r}', message)
    if content is None and "tool_calls" not in message:
        raise _error(f'messages[{i}] (role {role!r}) needs a "content": a string or a list of text parts', message)
    if isinstance(content, (list, tuple)):
        for part in content:
            _validate_part(i, part)
    elif content is not None and not isinstance(content, str):
        kind = type(content).__name__
        raise _error(f"messages[{i}]: content is a {kind}; pass a string or a list of text parts", message)


def _validate_part(i: int, part: Any) -> None:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text_part = '{"type": "text", "text": "..."}'
    raise _error(f"messages[{i}]: a content part of type {kind!r} is not supported; only {text_part} is", part)


def _with_string_content(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return message
    return message | {"content": "\n".join(part["text"] for part in content)}


def _error(text: str, value: object) -> VjaxValidationError:
    return VjaxValidationError(f"{text}.", parameter="messages", value=value)
