"""What form the text of a completion must have: names and meaning as in vLLM's `StructuredOutputsParams`.

Here is what can be checked without a tokenizer; `vjax/structured/` makes a grammar of it.
"""

from __future__ import annotations

import dataclasses
import json as json_module
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vjax.errors import VjaxValidationError

#: The fields of which exactly one says what the text must be.
KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """Constrains a completion to a JSON schema, a regular expression, one of some texts, a grammar, or running text
    with tool calls in it. Exactly one of the kinds is given; the other fields change how JSON is written.

    Tokens that lead out of the grammar cannot be drawn, and EOS only where the text may end. A completion that
    max_tokens, a stop string or a stop token ends earlier is a prefix. An engine with `reasoning_config` leaves what
    the model thinks free, and constrains what follows.

    Raises:
        VjaxValidationError: Not exactly one kind is given, or a value is of a wrong form. Whether a grammar is one, and
            a schema uses what llguidance knows, is checked when the request is added.
    """

    #: A JSON schema, as a mapping or as JSON text.
    json: str | dict[str, Any] | None = None
    #: A regular expression that the whole text matches, in the syntax of Rust's regex crate.
    regex: str | None = None
    #: The texts of which the completion is one.
    choice: list[str] | None = None
    #: A context-free grammar in Lark's syntax (first rule `start`) or EBNF as llama.cpp writes it (first rule `root`).
    grammar: str | None = None
    #: Any JSON object.
    json_object: bool | None = None
    #: Free text with calls in it: {"structures": [{"begin", "schema", "end"}, ...], "triggers": [...]}, as a mapping or
    #: as JSON text. Where the text has a trigger, one of the structures whose begin starts with it must follow.
    structural_tag: str | dict[str, Any] | None = None
    #: No whitespace between the tokens of JSON.
    disable_any_whitespace: bool = False
    #: Objects with properties have no other ones, where the schema does not say.
    disable_additional_properties: bool = False
    #: A regular expression of the whitespace that may stand between the tokens of JSON.
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        if self.json_object is False:  # it asks for nothing
            object.__setattr__(self, "json_object", None)
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            got = f"has {' and '.join(given)}" if given else "has no kind"
            raise _error("structured_outputs", self._given(), f"{got}; give exactly one of {', '.join(KINDS)}")
        self._check_options()
        if self.json is not None:
            object.__setattr__(self, "json", _mapping("json", self.json, "a JSON schema"))
        for name in ("regex", "grammar"):
            text = getattr(self, name)
            if text is not None and not (isinstance(text, str) and text.strip()):
                raise _error(name, text, "must be a text that is not empty")
        if self.choice is not None:
            self._check_choice()
        if self.json_object not in (None, True):
            raise _error("json_object", self.json_object, "must be True, False or None")
        if self.structural_tag is not None:
            tag = _mapping("structural_tag", self.structural_tag, "structures and triggers")
            _check_structural_tag(tag)
            object.__setattr__(self, "structural_tag", tag)

    @property
    def kind(self) -> str:
        """The one of KINDS that is given."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @classmethod
    def from_value(cls, value: Any) -> StructuredOutputsParams:
        """`value`, or what a mapping of the fields, as from a run file, stands for.

        Raises:
            VjaxValidationError: It is neither.
        """
        if isinstance(value, cls):
            return value
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(value, Mapping) or not set(value) <= set(names):
            allowed = f"must be a StructuredOutputsParams, or a mapping with {', '.join(names)}"
            raise _error("structured_outputs", value, allowed)
        return cls(**value)

    def _given(self) -> dict[str, Any]:
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default}

    def _check_options(self) -> None:
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise _error(name, getattr(self, name), "must be True or False")
        if self.whitespace_pattern is not None and not isinstance(self.whitespace_pattern, str):
            raise _error("whitespace_pattern", self.whitespace_pattern, "must be a regular expression or None")
        if self.whitespace_pattern is not None and self.disable_any_whitespace:
            allowed = "contradicts disable_any_whitespace=True; give one of them"
            raise _error("whitespace_pattern", self.whitespace_pattern, allowed)

    def _check_choice(self) -> None:
        choice = self.choice
        if not isinstance(choice, (list, tuple)) or not choice or not all(isinstance(c, str) for c in choice):
            raise _error("choice", choice, "must be a list of at least one text")
        object.__setattr__(self, "choice", list(choice))


def _mapping(name: str, value: Any, what: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json_module.loads(value)
        except ValueError as e:
            raise _error(name, value, f"is not JSON ({e}); pass {what} as a mapping or as JSON text") from e
    if not isinstance(value, Mapping):
        raise _error(name, value, f"must be {what}, as a mapping or as JSON text")
    try:
        # A copy: what the caller changes later changes no request.
        return json_module.loads(json_module.dumps(value))
    except (TypeError, ValueError, RecursionError) as e:
        raise _error(name, value, f"cannot be written as JSON ({e})") from e


_TAG_FIELDS = {"begin", "schema", "end"}


def _check_structural_tag(tag: dict[str, Any]) -> None:
    structures, triggers = tag.get("structures"), tag.get("triggers")
    form = '{"structures": [{"begin": text, "schema": JSON schema, "end": text}], "triggers": [text]}'
    if not (isinstance(structures, list) and structures and isinstance(triggers, list) and triggers):
        raise _error("structural_tag", tag, f"must be {form}, with at least one of each")
    if not all(isinstance(trigger, str) and trigger for trigger in triggers):
        raise _error("structural_tag", triggers, "has triggers that are not texts, or empty")
    for structure in structures:
        if not isinstance(structure, dict) or not _TAG_FIELDS >= set(structure) >= {"begin", "end"}:
            raise _error("structural_tag", structure, f"is no structure of {form}")
        schema = structure.setdefault("schema", {})
        if not (isinstance(structure["begin"], str) and isinstance(structure["end"], str) and isinstance(schema, dict)):
            raise _error("structural_tag", structure, f"is no structure of {form}")
        if not any(structure["begin"].startswith(trigger) for trigger in triggers):
            allowed = f"begins with none of the triggers {triggers}; add one, such as the beginning of it"
            raise _error("structural_tag", structure["begin"], allowed)


def _error(name: str, value: object, what: str) -> VjaxValidationError:
    return VjaxValidationError(f"{name}={value!r:.200} {what}.", parameter=name, value=value)
