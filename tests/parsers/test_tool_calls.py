from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vjax
from vjax.parsers.deltas import DeltaMessage, FunctionCall, ToolCall, join_deltas
from vjax.text.chat_messages import template_messages
from vjax.text.chat_template import render

TEMPLATES = Path(__file__).parents[1] / "text" / "templates"
NAMES = ("hermes", "llama3_json", "qwen3_coder", "qwen3_xml")
#: What a function of each type of argument looks like.
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "count": {"type": "integer"},
                    "ratio": {"type": "number"},
                    "flag": {"type": "boolean"},
                    "items": {"type": "array"},
                    "object": {"type": "object"},
                    "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                    "optional": {"type": ["string", "null"]},
                },
            },
        },
    }
]
relaxed = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def calls(*functions: tuple[str, str]) -> list[ToolCall]:
    return [ToolCall(FunctionCall(*function)) for function in functions]


def stream(parser, pieces) -> list[DeltaMessage]:
    one = parser.stream()
    return [*(one.feed(piece) for piece in pieces), one.finish()]


def cut(text: str, places) -> list[str]:
    ends = [0, *sorted(p % (len(text) + 1) for p in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(ends)]


# ---- whole texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "content", "expected"),
    [
        ("hermes", "", None, []),
        ("hermes", "no call <tool", "no call <tool", []),
        (
            "hermes",
            'I look.\n<tool_call>\n{"name": "f", "arguments": {"x": [1, {"y": "}</tool_call>\\""}]}}\n</tool_call>',
            "I look.\n",
            [("f", '{"x": [1, {"y": "}</tool_call>\\""}]}')],
        ),
        (
            "hermes",
            '<tool_call>{"arguments": {}, "id": [1, "2"], "k": -1.5e3, "name": "g\\u00e9"}</tool_call>\n \n'
            '<tool_call>\n{"name":"h","arguments":{"a":1}}\n</tool_call>\nDone.\n',
            "\nDone.\n",
            [("gé", "{}"), ("h", '{"a":1}')],
        ),
        # The end of the text may take the place of the end tag.
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}', None, [("f", "{}")]),
        # Bare or after the tag, one or several; both words for arguments.
        ("llama3_json", '{"name": "f", "parameters": {"x": 1}}', None, [("f", '{"x": 1}')]),
        (
            "llama3_json",
            ' <|python_tag|>{"type": "function", "name": "f", "arguments": {}}; {"name": "g", "parameters": {}}',
            " ",
            [("f", "{}"), ("g", "{}")],
        ),
        ("llama3_json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
        ("llama3_json", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
        ("llama3_json", "void f() { return {}; }", "void f() { return {}; }", []),
        (
            "qwen3_coder",
            'Now:\n\n<tool_call>\n<function=f>\n<parameter=text>\n\nif a < b:\n\tprint("é")\n\n</parameter>\n'
            "<parameter=count>\n3\n</parameter>\n<parameter=object>\n{'no': json}\n</parameter>\n"
            "<parameter=unknown>\n4\n</parameter>\n</function>\n</tool_call>",
            "Now:\n\n",
            [
                (
                    "f",
                    '{"text": "\\nif a < b:\\n\\tprint(\\"é\\")\\n", "count": 3, "object": "{\'no\': json}", '
                    '"unknown": "4"}',
                )
            ],
        ),
        # Without the outer tag and the end tag of a parameter, as models write at times.
        (
            "qwen3_xml",
            "<function=f><parameter=flag>True<parameter=maybe>None</function></tool_call>"
            "<tool_call><function=g></function></tool_call>",
            None,
            [("f", '{"flag": true, "maybe": null}'), ("g", "{}")],
        ),
    ],
)
def test_complete_texts(name, text, content, expected):
    extracted = vjax.tool_parser(name, TOOLS).extract_tool_calls(text)
    assert extracted == (content, calls(*expected))
    assert len({call.id for call in extracted.tool_calls}) == len(expected)


MALFORMED = {
    "hermes": [
        "<tool_call>f(x=1)</tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>{}</tool_call>",
        '<tool_call>{"name": "f"}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "name": "g", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}, "parameters": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": "a\nb"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1,}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": "\\q"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": ' + "[" * 20000 + "]" * 20000 + "}}</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"x": 1}</tool_call>',
        '<tool_call>{"name": "f", "other": tru, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f" "arguments": {}}</tool_call>',
    ],
    "qwen3_coder": [
        "<tool_call>\nf\n</tool_call>",
        "<tool_call><function=></function></tool_call>",
        "<tool_call><function=f\n></function></tool_call>",
        "<tool_call><function=f>text</function></tool_call>",
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
    ],
}
GOOD = {
    "hermes": '<tool_call>{"name": "good", "arguments": {"a": 1}}</tool_call>',
    "qwen3_coder": "<tool_call><function=good><parameter=a>1</parameter></function></tool_call>",
}


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name in MALFORMED for bad in MALFORMED[name]])
def test_a_malformed_call_is_content_and_harms_no_other(name, bad):
    parser = vjax.tool_parser(name, TOOLS)
    (good,) = parser.extract_tool_calls(GOOD[name]).tool_calls
    text = f"a {GOOD[name]}\n{bad}\n{GOOD[name]} b"
    assert parser.extract_tool_calls(text) == (f"a \n{bad}\n b", [good, good])
    pieces = text if len(text) < 1000 else [text[:300], text[300:]]
    assert join_deltas(stream(parser, pieces)) == join_deltas(stream(parser, [text]))


def test_an_unfinished_call_is_content():
    for name in NAMES:
        parser = vjax.tool_parser(name)
        text = GOOD.get(
            name, GOOD["qwen3_coder"] if "qwen" in name else '<|python_tag|>{"name": "f", "parameters": {}}'
        )
        end = text.index("</function>") if "qwen" in name else text.index("}") + 1
        for length in range(1, end):
            assert parser.extract_tool_calls(text[:length]) == (text[:length], [])
            assert join_deltas(stream(parser, text[:length])).content == text[:length]


def test_a_call_goes_back_into_a_message():
    parser = vjax.tool_parser("hermes")
    content, found = parser.extract_tool_calls('Well.<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>')
    message = {"role": "assistant", "content": content, "tool_calls": [dataclasses.asdict(call) for call in found]}
    (given,) = template_messages([message], "string")
    assert given["tool_calls"] == [
        {"id": found[0].id, "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    ]


def test_bad_arguments():
    with pytest.raises(vjax.VjaxValidationError, match="no tool parser 'hermess'; pass one of hermes, llama3_json"):
        vjax.tool_parser("hermess")
    for tools in ("f", [3], {"name": "f"}):
        with pytest.raises(vjax.VjaxValidationError, match=r"tools=.* must be a list of dicts"):
            vjax.tool_parser("hermes", tools)
    with pytest.raises(vjax.VjaxValidationError, match="must be a str, not NoneType"):
        vjax.tool_parser("hermes").extract_tool_calls(None)
    one = vjax.tool_parser("hermes").stream()
    assert not one.finish() and not one.finish()
    with pytest.raises(RuntimeError, match="finished"):
        one.feed("x")


# ---- types of the XML format --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("text", "3", "3"),
        ("text", "null", "null"),
        ("count", "-3", -3),
        ("count", "3.5", "3.5"),
        ("count", "none", None),
        ("ratio", "2.5e-3", 2.5e-3),
        ("ratio", "7", 7),
        ("ratio", "NaN", "NaN"),
        ("flag", "False", False),
        ("flag", "yes", "yes"),
        ("flag", "1", "1"),
        ("items", ' [1, "a"]', [1, "a"]),
        ("items", '{"a": 1}', '{"a": 1}'),
        ("object", '{"a": [true, null]}', {"a": [True, None]}),
        ("object", "[" * 20000, "[" * 20000),
        ("maybe", "5", 5),
        ("maybe", "null", None),
        ("optional", "5", "5"),
        ("optional", "None", None),
    ],
)
def test_types_come_from_the_schema(key, text, value):
    call = f"<function=f><parameter={key}>\n{text}\n</parameter></function>"
    for tools in (TOOLS, [tool["function"] for tool in TOOLS]):
        (found,) = vjax.tool_parser("qwen3_coder", tools).extract_tool_calls(call).tool_calls
        assert json.loads(found.function.arguments) == {key: value}
        assert type(json.loads(found.function.arguments)[key]) is type(value)


@pytest.mark.parametrize(
    "parameters", [None, 3, {"properties": []}, {"properties": {"x": 3}}, {"properties": {"x": {}}}]
)
def test_schemas_that_say_nothing(parameters):
    parser = vjax.tool_parser("qwen3_coder", [{"function": {"name": "f", "parameters": parameters}}, {"function": 3}])
    (found,) = parser.extract_tool_calls("<function=f><parameter=x>1</parameter></function>").tool_calls
    assert found.function.arguments == '{"x": "1"}'


# ---- streaming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hermes", "llama3_json"])
def test_json_arguments_stream_as_they_arrive(name):
    parser = vjax.tool_parser(name)
    one = parser.stream()
    head = '{"name": "f", "arguments": '
    assert not one.feed(("<tool_call>\n" if name == "hermes" else "") + head)
    (begun,) = one.feed('{"te').tool_calls
    assert (begun.index, begun.type, begun.function.name, begun.function.arguments) == (0, "function", "f", '{"te')
    assert begun.id.startswith("chatcmpl-tool-")
    (more,) = one.feed('xt": "ab').tool_calls
    assert (more.index, more.id, more.function.name, more.function.arguments) == (0, None, None, 'xt": "ab')
    assert one.feed('c"}').tool_calls[0].function.arguments == 'c"}'
    assert not one.feed("}") and not one.finish()


def test_strings_of_the_xml_format_stream_as_they_arrive():
    one = vjax.tool_parser("qwen3_coder", TOOLS).stream()
    fed = [
        "<tool_call>\n<function=f>\n",
        "<parameter=text>\n",
        'a "b"\n',
        "c\n",
        "</par",
        "ameter>\n<parameter=count>\n1",
    ]
    fed += ["2\n</parameter>", "\n</function>\n</tool_call>"]
    given = ["".join(c.function.arguments for c in one.feed(piece).tool_calls) for piece in fed]
    assert given == ["{", '"text": "', 'a \\"b\\"', "\\nc", "", '", "count": ', "12", "}"]


def test_a_call_that_turns_out_malformed_is_cancelled():
    parser = vjax.tool_parser("hermes")
    pieces = [
        '<tool_call>{"name": "f", "arguments": {"x": ',
        "oops!}}",
        '</tool_call><tool_call>{"name": "g", ',
        '"arguments": {}}',
    ]
    deltas = stream(parser, pieces)
    assert deltas[0].tool_calls[0].function.name == "f"
    (cancelled,) = deltas[1].tool_calls
    assert cancelled.cancelled and cancelled.index == 0
    assert deltas[3].tool_calls[0].index == 1
    assert join_deltas(deltas).content == "".join(pieces[:2]) + "</tool_call>"
    assert join_deltas(deltas).tool_calls == calls(("g", "{}"))


#: Pieces of which texts with calls, nearly calls and anything else are made.
FRAGMENTS = st.sampled_from(
    [
        *GOOD.values(), *(bad for some in MALFORMED.values() for bad in some if len(bad) < 1000),
        "<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=text>", "<parameter=count>",
        "</parameter>", "<|python_tag|>", '{"name": "f", ', '"arguments": ', '"parameters": ', '{"text": "',
        "{", "}", "}}", '"', "\\", ";", ",", ":", "\n", " ", "<", ">", "[", "]", "1", "é😀", "text", "null",
        '{"name": "f", "parameters": {"text": "a b"}}',
    ]
)  # fmt: skip
TEXTS = st.lists(FRAGMENTS | st.text(max_size=3), max_size=12).map("".join)


@pytest.mark.parametrize("name", NAMES[:3])
@relaxed
@given(text=TEXTS, places=st.lists(st.integers(0, 1000), max_size=20))
def test_streaming_equals_the_complete_form(name, text, places):
    parser = vjax.tool_parser(name, TOOLS)
    content, found = parser.extract_tool_calls(text)
    for pieces in (cut(text, places), text):
        message = join_deltas(stream(parser, pieces))
        assert (message.content, message.tool_calls, message.reasoning) == (content, found, None)
    for call in found:
        assert isinstance(json.loads(call.function.arguments), dict) and call.function.name
    if not found:
        assert (content or "") == text  # nothing is lost


# ---- what templates write, parsers read ---------------------------------------------------------------------------

STRINGS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = {
    "text": STRINGS,
    "count": st.integers(-(10**6), 10**6),
    "ratio": st.floats(allow_nan=False, allow_infinity=False),
    "flag": st.booleans(),
    "items": st.lists(st.integers() | STRINGS | st.none(), max_size=3),
    "object": st.dictionaries(STRINGS, st.booleans() | STRINGS, max_size=3),
    "maybe": st.none() | st.integers(),
}
ARGUMENTS = st.fixed_dictionaries({}, optional=VALUES)


@pytest.mark.parametrize("name", NAMES[:3])
@relaxed
@given(content=st.sampled_from(["", "Let me see."]), arguments=st.lists(ARGUMENTS, min_size=1, max_size=3))
def test_what_a_template_writes_is_read_back(name, content, arguments):
    if name == "llama3_json":
        content, arguments = "", arguments[:1]
    made = calls(*(("f", json.dumps(a)) for a in arguments))
    messages = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": content, "tool_calls": [dataclasses.asdict(call) for call in made]},
    ]
    template = (TEMPLATES / f"{name}.jinja").read_text()
    before = render(template, template_messages(messages[:1], "string"), add_generation_prompt=True, bos_token="")
    text = render(template, template_messages(messages, "string"), bos_token="")
    written = text.removeprefix(before).removesuffix("<|eot_id|>").removesuffix("<|im_end|>\n")
    found = vjax.tool_parser(name, TOOLS).extract_tool_calls(written)
    assert (found.content or "").strip() == content
    assert [call.function.name for call in found.tool_calls] == ["f"] * len(arguments)
    assert [json.loads(call.function.arguments) for call in found.tool_calls] == arguments
