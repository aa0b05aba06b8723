"""Parsers by vLLM's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vjax.errors import VjaxValidationError
from vjax.parsers.json_calls import HermesToolParser, Llama3JsonToolParser
from vjax.parsers.reasoning import DeepSeekR1ReasoningParser, Qwen3ReasoningParser, ReasoningParser
from vjax.parsers.tool_calls import ToolParser
from vjax.parsers.xml_calls import Qwen3CoderToolParser

TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesToolParser,
    "llama3_json": Llama3JsonToolParser,
    "qwen3_coder": Qwen3CoderToolParser,
    "qwen3_xml": Qwen3CoderToolParser,
}
REASONING_PARSERS: dict[str, type[ReasoningParser]] = {
    "deepseek_r1": DeepSeekR1ReasoningParser,
    "qwen3": Qwen3ReasoningParser,
}


def tool_parser(name: str, tools: Sequence[Mapping[str, Any]] | None = None) -> ToolParser:
    """The parser of a format of tool calls: `extract_tool_calls(text)` of a whole text, `stream()` for one in pieces.

    Args:
        name: "hermes" (Hermes, Qwen 2.5, Qwen 3), "llama3_json", "qwen3_coder" or "qwen3_xml" (both are one format).
        tools: The tools that `LLM.chat` was given; qwen3_coder takes the types of arguments from them.

    Raises:
        VjaxValidationError: There is no such parser, or `tools` is no list of dicts.
    """
    return _class_of(name, TOOL_PARSERS, "tool parser")(tools)


def reasoning_parser(name: str, chat_template_kwargs: Mapping[str, Any] | None = None) -> ReasoningParser:
    """The parser of a format of reasoning: `extract_reasoning(text)` of a whole text, `stream()` for one in pieces.

    Args:
        name: "deepseek_r1" or "qwen3".
        chat_template_kwargs: What `LLM.chat` was given; qwen3 reads enable_thinking.

    Raises:
        VjaxValidationError: There is no such parser, or `chat_template_kwargs` is no mapping.
    """
    return _class_of(name, REASONING_PARSERS, "reasoning parser")(chat_template_kwargs)


def _class_of(name: Any, classes: dict[str, Any], kind: str) -> Any:
    if isinstance(name, str) and name in classes:
        return classes[name]
    raise VjaxValidationError(
        f"there is no {kind} {name!r}; pass one of {', '.join(sorted(classes))}.", parameter="name", value=name
    )
