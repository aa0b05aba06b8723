from __future__ import annotations

import copy
from pathlib import Path

import pytest

from vjax.errors import VjaxValidationError
from vjax.text.chat import render_chat
from vjax.text.chat_messages import template_messages
from vjax.text.load import load_tokenizer

TEMPLATES = sorted((Path(__file__).parent / "templates").glob("*.jinja"))
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather <now>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]
CALL = {"id": "c0", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Köln", "days": 2}'}}
#: As a client of OpenAI's API writes it.
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Weather"}, {"type": "text", "text": "in Köln?"}]},
    {"role": "assistant", "content": None, "reasoning": "Look it up.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c0", "content": [{"type": "text", "text": "rain"}]},
    {"role": "assistant", "content": "Rain.", "tool_calls": []},
    {"role": "user", "content": "Thanks"},
]


def test_messages_as_templates_read_them():
    given = copy.deepcopy(CONVERSATION)
    parsed = {**CALL, "function": {"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}}
    assert template_messages(given, "string") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather\nin Köln?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning": "Look it up.",
            "reasoning_content": "Look it up.",
            "tool_calls": [parsed],
        },
        {"role": "tool", "tool_call_id": "c0", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
        {"role": "user", "content": "Thanks"},
    ]
    assert given == CONVERSATION
    parts = [message["content"] for message in template_messages(given, "openai")]
    text = {"type": "text", "text": "Be brief."}
    assert parts[:4] == [[text], CONVERSATION[1]["content"], [], "rain"]


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}', None, "", {}])
def test_arguments_of_calls(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    (message,) = template_messages([{"role": "assistant", "tool_calls": [call]}], "string")
    assert message["tool_calls"][0]["function"]["arguments"] == ({"x": 1} if arguments else {})


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_tool_templates_render_as_hugging_faces_do(path, save_tokenizer):
    from transformers import PreTrainedTokenizerFast

    directory = save_tokenizer("byte_level", chat_template=path.read_text(), bos_token="<|bos|>")
    theirs = PreTrainedTokenizerFast.from_pretrained(str(directory))
    ours = load_tokenizer(directory)
    for form in ("string", "auto"):
        text = render_chat(ours, CONVERSATION, tools=TOOLS, chat_template_content_format=form)
        messages = template_messages(CONVERSATION, "string")
        assert text == theirs.apply_chat_template(messages, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert "Köln" in text and "rain" in text and "get_weather" in text
    assert text.index("Weather\nin Köln?") < text.index("Rain.") < text.index("Thanks")
    plain = render_chat(ours, CONVERSATION[:2], tools=[], add_generation_prompt=False)
    assert plain == theirs.apply_chat_template(messages[:2], tokenize=False) and "get_weather" not in plain


def test_what_the_calls_look_like(byte_level_dir):
    def written(name: str, **options) -> str:
        template = (Path(__file__).parent / "templates" / f"{name}.jinja").read_text()
        return render_chat(load_tokenizer(byte_level_dir), CONVERSATION[1:3], chat_template=template, **options)

    assert '{"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}' in written("hermes")
    assert '{"name": "get_weather", "parameters": {"city": "Köln", "days": 2}}<|eot_id|>' in written("llama3_json")
    coder = written("qwen3_coder", enable_thinking=False)
    assert "<parameter=days>\n2\n</parameter>" in coder and "<think>\nLook it up.\n</think>" in coder
    assert coder.endswith("assistant\n<think>\n\n</think>\n\n")


def test_content_formats(byte_level_dir):
    tokenizer = load_tokenizer(byte_level_dir)
    looping = "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}"
    printing = "{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": ["b", {"type": "text", "text": "c"}]}]

    def text(template: str, form: str) -> str:
        return render_chat(tokenizer, messages, chat_template=template, chat_template_content_format=form)

    assert text(looping, "auto") == text(looping, "openai") == "[a][b][c]"
    assert text(printing, "auto") == text(printing, "string") == "ab\nc"
    assert text(printing, "openai").startswith("[{'type': 'text', 'text': 'a'}]")
    with pytest.raises(VjaxValidationError, match="chat_template_content_format='parts' must be one of auto, string"):
        text(printing, "parts")


ASSISTANT = {"role": "assistant"}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": 3, "content": "x"}, r'messages\[1\] needs a "role" such as "system", .* not 3'),
        ({"role": "tool", "tool_call_id": "c0"}, r'messages\[1\] \(role \'tool\'\) needs a "content"'),
        ({"role": "user", "tool_calls": [CALL]}, r'messages\[1\] \(role \'user\'\) needs a "content"'),
        ({"role": "assistant", "tool_calls": []}, r"messages\[1\] .* needs a .* tool_calls or reasoning"),
        ({**ASSISTANT, "tool_calls": CALL}, r"messages\[1\]: tool_calls is a dict; pass a list"),
        (
            {**ASSISTANT, "tool_calls": [CALL, {"name": "f"}]},
            r"messages\[1\]: tool_calls\[1\] is {'name': 'f'}; a call",
        ),
        ({**ASSISTANT, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, r"tool_calls\[0\]: .* not JSON"),
        ({**ASSISTANT, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, "the arguments are a list"),
        ({"role": "user", "content": ["a", {"type": "image_url"}]}, r"messages\[1\]: content\[1\]: .*'image_url'"),
    ],
)
def test_a_malformed_message_is_named(byte_level_dir, message, text):
    with pytest.raises(VjaxValidationError, match=text):
        render_chat(load_tokenizer(byte_level_dir), [{"role": "user", "content": "x"}, message])


@pytest.mark.parametrize("tools", ["f", {"name": "f"}, [len], 3])
def test_tools_are_a_list_of_dicts(byte_level_dir, tools):
    with pytest.raises(VjaxValidationError, match=r"tools=.* must be a list of dicts such as"):
        render_chat(load_tokenizer(byte_level_dir), [{"role": "user", "content": "x"}], tools=tools)
