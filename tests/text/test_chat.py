from __future__ import annotations

import datetime

import pytest

from vjax.errors import VjaxValidationError
from vjax.text.chat import chat_prompt, render_chat
from vjax.text.chat_template import iterates_over_content, render
from vjax.text.load import load_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " <b>你好</b> & more "},
    {"role": "assistant", "content": "Hi", "tool_calls": [{"name": "f", "arguments": {"x": 1, "y": "é<"}}]},
    {"role": "user", "content": "Bye", "name": None},
]
#: Each uses some of what templates of public models use.
TEMPLATES = {
    "loop": "{% for message in messages %}\n{{ bos_token if loop.first }}{{ message.role }}: "
    "{{ message['content'] | trim }}{% if not loop.last %}\n---{% endif %}\n{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.n = ns.n + 1 %}{% endif %}{% endfor %}{{ ns.n }} {{ messages | length }}",
    "tojson": "{% for m in messages if m.tool_calls %}{{ m.tool_calls | tojson }}|{{ m | tojson(indent=2) }}"
    "{% endfor %}",
    "macro": "{%- macro turn(m) -%}\n  [{{ m.role | upper }}] {{ m.content }}\n{%- endmacro %}\n"
    "    {%- for m in messages %}\n    {{ turn(m) }}\n    {%- endfor %}{{ eos_token }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}",
    "loopcontrols": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "prompt": "{{ messages[-1].content }}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "tools": "{% if tools is not none %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% else %}none{% endif %}",
    "variables": "{{ 'think' if enable_thinking is defined and enable_thinking else 'no' }}{{ strftime_now('%Y') }}",
    "strings": "{{ messages[0].content.split(' ')[0].startswith('Be') }}{{ messages[1]['content'][1:4] }}"
    "{{ dict(a=1) }}",
}


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_rendering_equals_hugging_faces(name, add_generation_prompt, save_tokenizer):
    from transformers import PreTrainedTokenizerFast

    directory = save_tokenizer("byte_level", chat_template=TEMPLATES[name], eos_token="<|end|>", bos_token="<|bos|>")
    theirs = PreTrainedTokenizerFast.from_pretrained(str(directory))
    ours = load_tokenizer(directory)
    options = {"add_generation_prompt": add_generation_prompt, "enable_thinking": True}
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        expected = theirs.apply_chat_template(MESSAGES, tokenize=False, tools=tools, **options)
        assert ours.apply_chat_template(MESSAGES, tokenize=False, tools=tools, **options) == expected
        ids = theirs.apply_chat_template(MESSAGES, tools=tools, return_dict=False, **options)
        assert ours.apply_chat_template(MESSAGES, tools=tools, **options) == ids


@pytest.mark.parametrize("template", ["{{ messages[-1].content }}<|end|>", "{{ messages[-1].content | trim }}<|end|>"])
def test_continue_final_message_equals_hugging_faces(template, save_tokenizer):
    from transformers import PreTrainedTokenizerFast

    directory = save_tokenizer("byte_level", chat_template=template)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(directory))
    ours = load_tokenizer(directory)
    for content in ("The answer is ", "x"):
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
        expected = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        assert ours.apply_chat_template(messages, tokenize=False, continue_final_message=True) == expected


def test_template_sources(save_tokenizer):
    several = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    directory = save_tokenizer("byte_level", chat_template=several)
    tokenizer = load_tokenizer(directory)
    message = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "D"
    assert tokenizer.apply_chat_template(message, tokenize=False, tools=[{}]) == "T"
    assert tokenizer.apply_chat_template(message, tokenize=False, chat_template="tool_use") == "T"
    assert tokenizer.apply_chat_template(message, tokenize=False, chat_template="own {{ 1 }}") == "own 1"
    (directory / "chat_template.jinja").write_text("file")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("rag")
    tokenizer = load_tokenizer(directory)
    assert tokenizer.chat_templates == {"default": "file", "rag": "rag"}


def test_chat_prompt_has_text_and_ids(byte_level_dir):
    tokenizer = load_tokenizer(byte_level_dir)
    prompt = chat_prompt(tokenizer, [{"role": "user", "content": "hello"}])
    assert prompt["prompt"] == "<|user|>\nhello<|end|>\n<|assistant|>\n"
    assert prompt["prompt_token_ids"] == tokenizer.encode(prompt["prompt"], add_special_tokens=False)
    assert prompt["prompt_token_ids"][0] == tokenizer.convert_tokens_to_ids("<|user|>")


def test_content_parts(byte_level_dir):
    tokenizer = load_tokenizer(byte_level_dir)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}]
    assert render_chat(tokenizer, messages, add_generation_prompt=False) == "<|user|>\na\nb<|end|>\n"
    looping = "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}"
    assert render_chat(tokenizer, messages, chat_template=looping) == "[a][b]"


def test_iterates_over_content():
    assert iterates_over_content("{% for m in messages %}{% for c in m['content'] %}{{ c }}{% endfor %}{% endfor %}")
    assert iterates_over_content("{% set c = messages[0].content %}{% for p in c %}{% endfor %}")
    assert not iterates_over_content("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert not iterates_over_content("{% broken")


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "non-empty list of messages"),
        ("hello", "non-empty list of messages"),
        (["hello"], r"messages\[0\] is a str"),
        ([{"content": "x"}], r'messages\[0\] needs a "role"'),
        ([{"role": "user"}], r'messages\[0\] \(role \'user\'\) needs a "content"'),
        ([{"role": "user", "content": 3}], "content is a int"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "'image_url' is not supported"),
        ([{"role": "user", "content": "x", "extra": object()}], "holds a object, which is not JSON"),
    ],
)
def test_malformed_messages(byte_level_dir, messages, text):
    with pytest.raises(VjaxValidationError, match=text):
        render_chat(load_tokenizer(byte_level_dir), messages)


def test_template_errors(save_tokenizer):
    tokenizer = load_tokenizer(save_tokenizer("byte_level"))
    message = [{"role": "user", "content": "x"}]
    with pytest.raises(VjaxValidationError, match="has no chat template; pass one"):
        render_chat(tokenizer, message)
    with pytest.raises(VjaxValidationError, match="no system role here"):
        render_chat(tokenizer, message, chat_template="{{ raise_exception('no system role here') }}")
    with pytest.raises(VjaxValidationError, match=r"not valid Jinja \(line 2"):
        render_chat(tokenizer, message, chat_template="\n{% for %}")
    with pytest.raises(VjaxValidationError, match="set one of them to False"):
        render_chat(tokenizer, message, chat_template="x", continue_final_message=True)
    with pytest.raises(VjaxValidationError, match="leaves the final message out"):
        render("x", message, continue_final_message=True)
    with pytest.raises(VjaxValidationError, match="whose content is text"):
        render("x", [{"role": "assistant", "tool_calls": []}], continue_final_message=True)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace(_x=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ strftime_now.__globals__ }}",
    ],
)
def test_templates_are_confined(template):
    try:
        text = render(template, [{"role": "user", "content": "x"}])
    except VjaxValidationError:
        return
    assert text == ""  # an unsafe attribute reads as undefined


def test_strftime_now():
    assert render("{{ strftime_now('%Y-%m') }}", []) == datetime.datetime.now().strftime("%Y-%m")
