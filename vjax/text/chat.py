"""Conversations to prompts: renders the model's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vjax.errors import VjaxValidationError
from vjax.text.chat_messages import ContentForm, template_messages
from vjax.text.chat_template import iterates_over_content
from vjax.text.tokenizer import Tokenizer

#: Names that the renderer itself uses.
_RESERVED = {"messages", "template", "tokenize"}
_CONTENT_FORMATS = ("auto", "string", "openai")


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    /,
    *,
    chat_template: str | None = None,
    chat_template_content_format: str = "auto",
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **template_kwargs: Any,
) -> str:
    """The prompt text of one conversation. Encode it with `add_special_tokens=False`: the template writes its own.

    Args:
        messages: Dicts with "role" and "content"; content is a string or a list of {"type": "text", "text": ...}.
            Assistants' messages may have "tool_calls" (arguments as a dict or as JSON text) and "reasoning".
        chat_template: Jinja text or the name of one of the model's templates; None: the model's default.
        chat_template_content_format: What the template takes as content: "string", "openai" (a list of text parts), or
            "auto", parts for a template that loops over them.
        tools: Descriptions of functions, as OpenAI's API has them.
        template_kwargs: Further variables that the template reads, such as enable_thinking.

    Raises:
        VjaxValidationError: A message, a tool or an option is malformed, there is no template, it refuses the messages,
            or a name of `template_kwargs` is not free.
    """
    if taken := sorted(_RESERVED & template_kwargs.keys()):
        raise VjaxValidationError(
            f"chat_template_kwargs has the name {taken[0]!r}, which is not free for a template's variable; rename it.",
            parameter="chat_template_kwargs",
            value=template_kwargs,
        )
    checked_tools = _checked_tools(tools)
    template = tokenizer.get_chat_template(chat_template, has_tools=bool(checked_tools))
    text = tokenizer.apply_chat_template(
        template_messages(messages, _content_form(chat_template_content_format, template)),
        tokenize=False,
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        tools=checked_tools,
        **template_kwargs,
    )
    assert isinstance(text, str)
    return text


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], /, **options: Any) -> dict[str, Any]:
    """The conversation as a prompt for generate: {"prompt": text, "prompt_token_ids": ids}. Options, errors: as
    `render_chat`."""
    text = render_chat(tokenizer, messages, **options)
    return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}


def _content_form(content_format: str, template: str) -> ContentForm:
    if content_format == "auto":
        return "openai" if iterates_over_content(template) else "string"
    if content_format == "string" or content_format == "openai":
        return content_format
    raise VjaxValidationError(
        f"chat_template_content_format={content_format!r} must be one of {', '.join(_CONTENT_FORMATS)}.",
        parameter="chat_template_content_format",
        value=content_format,
    )


def _checked_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tools as a list of dicts; None where there are none."""
    if not isinstance(tools, (list, tuple, type(None))) or not all(isinstance(tool, Mapping) for tool in tools or ()):
        raise VjaxValidationError(
            f"tools={tools!r:.100} must be a list of dicts such as "
            '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}.',
            parameter="tools",
            value=tools,
        )
    return [dict(tool) for tool in tools] if tools else None
