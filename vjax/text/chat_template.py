"""Renders Jinja chat templates with the filters, globals and whitespace rules that templates on the hub rely on.

Templates are untrusted code: they run in Jinja's immutable sandbox and see nothing but JSON values.
"""

from __future__ import annotations

import functools
import json
from datetime import datetime
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from vjax.errors import VjaxValidationError

#: Marks the end of the final message where it is to be continued; the space tells whether the template trims messages.
_CONTINUE = "\ue000vjax-continue\ue000 "


def render(
    template: str,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    tools: list[dict[str, Any]] | None = None,
    documents: list[dict[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The prompt text of a conversation.

    Args:
        template: Jinja text.
        messages: JSON values. Keys whose value is None are left out, since many templates would print "None".
        add_generation_prompt: End with the header of the assistant's turn.
        continue_final_message: End inside the final message, so that the model goes on writing it.
        variables: Further names that the template sees (the special tokens among them).

    Raises:
        VjaxValidationError: The template is broken or refuses the messages; a value is not JSON; both of
            add_generation_prompt and continue_final_message are set.
    """
    if add_generation_prompt and continue_final_message:
        raise VjaxValidationError(
            "add_generation_prompt=True starts a new message and continue_final_message=True goes on with the last "
            "one; set one of them to False.",
            parameter="continue_final_message",
            value=True,
        )
    plain = [{k: _plain(v) for k, v in message.items() if v is not None} for message in messages]
    if continue_final_message:
        _mark_final_message(plain)
    context = {**{name: _plain(value) for name, value in variables.items()}, "messages": plain}
    context |= {"tools": _plain(tools), "documents": _plain(documents), "add_generation_prompt": add_generation_prompt}
    try:
        text = _compile(template).render(context)
    except jinja2.TemplateSyntaxError as e:
        raise VjaxValidationError(f"the chat template is not valid Jinja (line {e.lineno}: {e.message}).") from e
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as e:
        raise VjaxValidationError(f"the chat template cannot render these messages: {e}", parameter="messages") from e
    return _cut_at_mark(text) if continue_final_message else text


@functools.lru_cache(maxsize=64)
def iterates_over_content(template: str) -> bool:
    """Whether a template loops over a message's content, that is, takes a list of parts and not only a string."""
    try:
        tree = _environment().parse(template)
    except jinja2.TemplateSyntaxError:
        return False
    names = {
        node.target.name
        for node in tree.find_all(jinja2.nodes.Assign)
        if isinstance(node.target, jinja2.nodes.Name) and _reads_content(node.node)
    }
    loops = (node.iter for node in tree.find_all(jinja2.nodes.For))
    return any(_reads_content(i) or (isinstance(i, jinja2.nodes.Name) and i.name in names) for i in loops)


def _reads_content(node: jinja2.nodes.Node) -> bool:
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, jinja2.nodes.Getitem):
        return isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == "content"
    return False


def _mark_final_message(messages: list[dict[str, Any]]) -> None:
    content = messages[-1].get("content") if messages else None
    texts = [p for p in content if isinstance(p, dict) and "text" in p] if isinstance(content, list) else []
    if isinstance(content, str):
        messages[-1]["content"] = content + _CONTINUE
    elif texts:
        texts[-1]["text"] += _CONTINUE
    else:
        raise VjaxValidationError(
            "continue_final_message=True needs a final message whose content is text.",
            parameter="continue_final_message",
            value=True,
        )


def _cut_at_mark(text: str) -> str:
    end = text.rfind(_CONTINUE.rstrip())
    if end < 0:
        raise VjaxValidationError(
            "continue_final_message=True: the chat template leaves the final message out of the prompt.",
            parameter="continue_final_message",
            value=True,
        )
    kept = text[:end]
    return kept if text.startswith(_CONTINUE, end) else kept.rstrip()


def _plain(value: Any) -> Any:
    """A copy made of JSON types alone, since methods of richer objects are a way out of the sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    for base in (str, int, float):
        if isinstance(value, base):
            return base(value)
    raise VjaxValidationError(
        f"a chat message or template argument holds a {type(value).__name__}, which is not JSON; pass str, numbers, "
        "lists and dicts.",
        value=value,
    )


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, with which some templates mark the assistant's text: only the body."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Refuses names that begin with an underscore, which reach into the interpreter."""

    def __init__(*args: Any, **kwargs: Any):
        self, *rest = args
        for name in dict(*rest, **kwargs):
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, *rest, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} begins with an underscore")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    # Jinja's own filter escapes HTML, which would reach the model.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = _Namespace
    return environment


@functools.lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)
