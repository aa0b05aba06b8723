from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vjax
from vjax.parsers.deltas import join_deltas

CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
XML_CALL = "<tool_call>\n<function=f>\n</function>\n</tool_call>"
OFF = {"enable_thinking": False}


@pytest.mark.parametrize(
    ("name", "kwargs", "text", "reasoning", "content"),
    [
        ("deepseek_r1", None, "<think>\na\n</think>\n\nb", "\na\n", "\n\nb"),
        ("deepseek_r1", None, "a</think>b</think><think>c", "a", "b</think><think>c"),
        ("deepseek_r1", None, "\n <think>a", "a", None),
        ("deepseek_r1", None, "cut short </thin", "cut short </thin", None),
        ("deepseek_r1", None, "<think></think>", None, None),
        ("deepseek_r1", None, "", None, None),
        ("deepseek_r1", None, f"a {CALL}</think>b", f"a {CALL}", "b"),
        ("qwen3", None, "a</think>\n\nb", "a", "\n\nb"),
        ("qwen3", None, "a", "a", None),
        ("qwen3", {"enable_thinking": True}, "<think>a</think>b", "a", "b"),
        ("qwen3", None, f"a {CALL}", "a ", CALL),
        ("qwen3", None, f"a {XML_CALL} b", "a ", f"{XML_CALL} b"),
        ("qwen3", None, "is <tool_call>\n the tag?</think>b", "is <tool_call>\n the tag?", "b"),
        ("qwen3", None, "<tool_call>", "<tool_call>", None),
        ("qwen3", OFF, " plain </think> text", None, " plain </think> text"),
        ("qwen3", OFF, "<think>\n\n</think>\n\ntext", "\n\n", "\n\ntext"),
    ],
)
def test_reasoning_and_content(name, kwargs, text, reasoning, content):
    parser = vjax.reasoning_parser(name, kwargs)
    assert parser.extract_reasoning(text) == (reasoning, content)
    one = parser.stream()
    message = join_deltas([*map(one.feed, text), one.finish()])
    assert (message.reasoning, message.content, message.tool_calls) == (reasoning, content, [])


def test_text_is_held_back_only_where_a_tag_may_begin():
    one = vjax.reasoning_parser("deepseek_r1").stream()
    fed = ["<thi", "nk>a", "b</", "i> c</think", ">", "d<", "/think>"]
    deltas = [one.feed(piece) for piece in fed]
    assert [d.reasoning for d in deltas] == [None, "a", "b", "</i> c", None, None, None]
    assert [d.content for d in deltas] == [None, None, None, None, None, "d<", "/think>"]


def test_bad_arguments():
    with pytest.raises(vjax.VjaxValidationError, match="no reasoning parser None; pass one of deepseek_r1, qwen3"):
        vjax.reasoning_parser(None)
    with pytest.raises(vjax.VjaxValidationError, match="chat_template_kwargs=True must be a dict"):
        vjax.reasoning_parser("qwen3", True)


FRAGMENTS = st.sampled_from(
    ["<think>", "</think>", "<tool_call>", "<", "</", "<function=f>", "{", "\n", " ", "thought", CALL, XML_CALL]
)


@pytest.mark.parametrize(("name", "kwargs"), [("deepseek_r1", None), ("qwen3", None), ("qwen3", OFF)])
@settings(max_examples=150, deadline=None)
@given(st.lists(FRAGMENTS | st.text(max_size=3), max_size=10), st.lists(st.integers(0, 200), max_size=10))
def test_reasoning_then_calls_for_any_split(name, kwargs, fragments, places):
    """Both parsers in a row give what they give for the whole text."""
    text = "".join(fragments)
    ends = [0, *sorted(p % (len(text) + 1) for p in places), len(text)]
    reasoning, content = vjax.reasoning_parser(name, kwargs).extract_reasoning(text)
    rest, calls = vjax.tool_parser("hermes").extract_tool_calls(content or "")
    thinking, calling = vjax.reasoning_parser(name, kwargs).stream(), vjax.tool_parser("hermes").stream()
    deltas = [*(thinking.feed(text[a:b]) for a, b in itertools.pairwise(ends)), thinking.finish()]
    called = [*(calling.feed(delta.content or "") for delta in deltas), calling.finish()]
    assert join_deltas(deltas).reasoning == reasoning and join_deltas(deltas).content == content
    assert (join_deltas(called).content, join_deltas(called).tool_calls) == (rest, calls)
