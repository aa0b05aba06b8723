"""Grammars and masks without an engine: what is asked for, and which tokens it leaves."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vjax import SamplingParams, StructuredOutputsParams, VjaxValidationError
from vjax.messages import mask_width
from vjax.structured.compiler import GrammarCompiler
from vjax.structured.grammar import closed, grammar_text
from vjax.structured.matcher import MaskFiller
from vjax.structured.reasoning import ReasoningTags
from vjax.text.load import load_tokenizer

EOS = (0, 1)
VOCAB_SIZE = 4096 + 7  # ids without a token behind the tokenizer's


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("vjax-tiny")


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(lambda: tokenizer, vocab_size=VOCAB_SIZE, eos_token_ids=lambda _: EOS)


def allowed(compiler, *sequences: tuple[StructuredOutputsParams | None, list[int]]) -> list[set[int]]:
    """What may follow the ids in each grammar, all in one mask; None is a row without one."""
    mask = np.full((len(sequences), mask_width(VOCAB_SIZE)), -1, np.int32)
    matchers = []
    for row, (params, ids) in enumerate(sequences):
        if params is not None:
            matcher = compiler.matcher(grammar_text(params))
            prompt = [7, 8, 9]
            for end in range(len(ids) + 1):
                matcher.follow([*prompt, *ids[:end]], len(prompt))
            assert matcher.error == ""
            matchers.append((row, matcher))
    MaskFiller().fill(mask, matchers)
    bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")[:, :VOCAB_SIZE]
    return [set(np.flatnonzero(row).tolist()) for row in bits]


def test_masks_of_choices(compiler, tokenizer):
    """Allowed is what continues one of the texts, and EOS behind a whole one; where only one text is left, its next
    token as the tokenizer writes it."""
    choices = ["self.name", "self", "return x", "set"]
    params = StructuredOutputsParams(choice=choices)
    texts = [tokenizer.decode([i], skip_special_tokens=False) for i in range(4096)]

    def wanted(done: str) -> set[int]:
        ids = {i for i, t in enumerate(texts) if i not in EOS and t and any(c.startswith(done + t) for c in choices)}
        ids |= set(EOS) if done in choices else set()
        left = [c for c in choices if c.startswith(done)]
        if len(left) == 1 and left != [done]:
            ids &= set(tokenizer.encode(left[0], add_special_tokens=False))
        return ids

    cases = ["", "s", "self", "self.", "self.name", "return", "set"]
    found = allowed(compiler, *[(params, tokenizer.encode(c, add_special_tokens=False)) for c in cases], (None, []))
    assert found == [*map(wanted, cases), set(range(VOCAB_SIZE))]
    assert len(found[0]) > 5 and found[4] == set(EOS) < found[2] and len(found[3]) == len(found[5]) == 1


def test_a_text_that_ended_has_nothing_but_eos(compiler, tokenizer):
    """With ignore_eos there are steps behind it."""
    ids = tokenizer.encode("ab", add_special_tokens=False)
    params = StructuredOutputsParams(regex="(ab)+")
    assert allowed(compiler, (params, [*ids, 0]), (params, [*ids, 1, 1, 0])) == [set(EOS)] * 2


def test_a_token_out_of_the_grammar_is_an_error_of_its_matcher(compiler):
    grammar = grammar_text(StructuredOutputsParams(choice=["yes"]))
    one, other = compiler.matcher(grammar), compiler.matcher(grammar)
    one.follow([300, 301], 0)
    assert one.error and not other.error


def test_a_batch_is_followed_as_each_of_it_alone(compiler, tokenizer):
    """Steps of no, one and several tokens; texts that end on the way, and tokens out of the grammar."""
    rng = np.random.default_rng(0)
    texts = ["[1, 22, 333]", '{"a": [true, {"b": null}]}', "[]", '"no object"']
    grammar = grammar_text(StructuredOutputsParams(regex=r"(\{|\[)[^#]*(\}|\])"))
    sequences = [[5, *tokenizer.encode(text, add_special_tokens=False), EOS[0], 1] for text in texts for _ in range(3)]
    ends = np.sort(rng.integers(0, [len(ids) + 1 for ids in sequences], (6, len(sequences))), axis=0)
    batch, alone = ([compiler.matcher(grammar) for _ in sequences] for _ in range(2))
    filler = MaskFiller()
    masks = np.zeros((2, len(sequences), mask_width(VOCAB_SIZE)), np.int32)
    for step in ends.tolist():
        filler.follow([(m, ids[:end], 1) for m, ids, end in zip(batch, sequences, step, strict=True)])
        for m, ids, end in zip(alone, sequences, step, strict=True):
            m.follow(ids[:end], 1)
        for mask, matchers in zip(masks, (batch, alone), strict=True):
            filler.fill(mask, list(enumerate(matchers)))
        np.testing.assert_array_equal(masks[0], masks[1])
        assert [bool(m.error) for m in batch] == [bool(m.error) for m in alone]
    assert {bool(m.error) for m in batch} == {True, False}


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({}, ["has no kind", "exactly one of json, regex, choice, grammar, json_object, structural_tag"]),
        ({"json_object": False}, ["has no kind"]),
        ({"regex": "a", "choice": ["a"]}, ["has regex and choice", "exactly one"]),
        ({"json": "{"}, ["json='{'", "is not JSON", "as a mapping or as JSON text"]),
        ({"json": "[1]"}, ["json=[1]", "must be a JSON schema"]),
        ({"json": {"const": {1, 2}}}, ["cannot be written as JSON"]),
        ({"regex": ""}, ["regex=''", "must be a text that is not empty"]),
        ({"grammar": 3}, ["grammar=3", "must be a text"]),
        ({"choice": []}, ["choice=[]", "at least one text"]),
        ({"choice": "yes"}, ["choice='yes'", "list of at least one text"]),
        ({"json_object": "yes"}, ["json_object='yes'", "True, False or None"]),
        ({"regex": "a", "disable_any_whitespace": 1}, ["disable_any_whitespace=1", "True or False"]),
        ({"json": {}, "whitespace_pattern": 3}, ["whitespace_pattern=3", "regular expression"]),
        ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, ["' '", "contradicts"]),
        ({"structural_tag": {"structures": []}}, ["structural_tag", '"triggers": [text]', "at least one of each"]),
        (
            {"structural_tag": {"structures": [{"begin": "<a>", "end": ""}], "triggers": ["<b"]}},
            ["'<a>'", "none of the triggers ['<b']"],
        ),
        ({"structural_tag": {"structures": [{"begin": "<a>"}], "triggers": ["<a"]}}, ["{'begin': '<a>'}", "structure"]),
        ({"jsn": {}}, ["{'jsn': {}}", "a mapping with json, regex"]),
    ],
)
def test_bad_parameters(fields, texts):
    with pytest.raises(VjaxValidationError) as e:
        SamplingParams(structured_outputs=fields)
    assert all(text in str(e.value) for text in texts), str(e.value)


def test_parameters():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    given = StructuredOutputsParams(json=schema)
    assert given == StructuredOutputsParams(json=json.dumps(schema)) and given.kind == "json"
    params = SamplingParams(structured_outputs={"json": schema})
    assert params.structured_outputs == given and params.clone() == params
    schema["type"] = "array"
    assert given.json["type"] == "object"
    assert "regex='a+'" in repr(SamplingParams(structured_outputs={"regex": "a+"}))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"json": {"type": "strin"}}, "Invalid type: strin"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"grammar": "start: missing"}, "missing"),
        ({"grammar": "root ::= ("}, "Expected"),
        ({"choice": ["\ud800"]}, "hex escape"),
        ({"regex": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_bad_grammars(compiler, fields, text):
    with pytest.raises(ValueError, match=text):
        compiler.matcher(grammar_text(StructuredOutputsParams(**fields)))


def test_compiled_grammars_are_kept_and_shared(tokenizer, monkeypatch):
    from vjax.structured import compiler as module

    monkeypatch.setattr(module, "_MAX_KEPT", 2)
    loads, compiles = [], []
    compiler = GrammarCompiler(lambda: loads.append(0) or tokenizer, vocab_size=VOCAB_SIZE, eos_token_ids=lambda _: EOS)
    compile_ = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda grammar: compiles.append(grammar) or compile_(grammar))
    a, b, c = (grammar_text(StructuredOutputsParams(choice=[text])) for text in "abc")
    for grammar in (a, b, a, c, a, b):
        compiler.matcher(grammar)
    assert compiles == [a, b, c, b] and len(loads) == 1


def test_closed():
    """Names of properties are no keywords, values are no schemas."""
    inner = {"properties": {"b": {"type": "null"}}}
    schema = {
        "properties": {"properties": inner, "open": {**inner, "additionalProperties": True}},
        "anyOf": [inner, {"enum": [inner]}],
    }
    shut = {**inner, "additionalProperties": False}
    assert closed(schema) == {
        "properties": {"properties": shut, "open": {**inner, "additionalProperties": True}},
        "anyOf": [shut, {"enum": [inner]}],
        "additionalProperties": False,
    }


def test_without_a_tokenizer_that_can_be_used():
    for load, ends, text in [
        (lambda: None, EOS, "skip_tokenizer_init=True"),
        (lambda: load_tokenizer("vjax-tiny"), (), "EOS token"),
    ]:
        compiler = GrammarCompiler(load, vocab_size=VOCAB_SIZE, eos_token_ids=lambda _, ends=ends: ends)
        with pytest.raises(VjaxValidationError, match=text):
            compiler.matcher(grammar_text(StructuredOutputsParams(choice=["a"])))


TAGS = st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TAGS, TAGS, st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 12))
def test_ends_of_reasoning(start: tuple[int, ...], end: tuple[int, ...], tokens: list[int], num_prompt: int):
    """Against a search at every place."""
    num_prompt = min(num_prompt, len(tokens))
    tags = ReasoningTags(start, end)

    def ends(tag: tuple[int, ...], stop: int) -> list[int]:
        return [i for i in range(len(tag), stop + 1) if tuple(tokens[i - len(tag) : i]) == tag]

    closed = max(ends(end, num_prompt), default=0) > max(ends(start, num_prompt), default=0)
    assert tags.has_ended(tokens[:num_prompt]) == closed
    later = [i for i in ends(end, len(tokens)) if i > num_prompt]
    assert tags.end_of_reasoning(tokens, num_prompt) == min(later, default=None)


@pytest.mark.parametrize("pieces", [1, 2, 20])
def test_a_matcher_follows_from_the_end_of_the_reasoning(tokenizer, compiler, pieces: int):
    """However the tokens come, and in the same place as one that saw the answer alone."""
    tags = ReasoningTags((7,), (8, 9))
    reasoning = GrammarCompiler(
        lambda: tokenizer, vocab_size=VOCAB_SIZE, eos_token_ids=lambda _: EOS, tags=tags
    ).matcher(grammar_text(StructuredOutputsParams(choice=["yes sir"])))
    (first, *_) = answer = tokenizer.encode("yes sir", add_special_tokens=False)
    tokens, num_prompt = [3, 8, 9, 7, 4, 8, 5, 8, 9, *answer, 0], 4
    is_reasoning = []
    for end in range(num_prompt, len(tokens) + 1, pieces):
        reasoning.follow(tokens[:end], num_prompt)
        is_reasoning.append(reasoning.is_reasoning)
        assert is_reasoning[-1] == (end < 9)
    reasoning.follow(tokens, num_prompt)
    assert not reasoning.is_reasoning and not reasoning.error
    wrong = reasoning.__class__(compiler.matcher(grammar_text(StructuredOutputsParams(choice=["no"]))).matcher, tags)
    wrong.follow([*tokens[:9], first], num_prompt)
    assert wrong.error


def walk(matcher, rng, num_steps: int, ids: list[int]) -> list[np.ndarray]:
    """Draws a text, or follows `ids`; the masks on its way."""
    masks = []
    drawn = list(ids)
    for step in range(num_steps):
        mask = np.full((1, mask_width(VOCAB_SIZE)), -1, np.int32)
        MaskFiller().fill(mask, [(0, matcher)])
        masks.append(mask)
        if step >= len(drawn):
            drawn.append(int(rng.choice(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")))))
        matcher.follow(drawn[: step + 1], 0)
    ids[:] = drawn
    return masks


def test_states_of_requests_that_ended_change_no_mask(tokenizer):
    """Released in the middle, behind the end and with an error."""
    rng = np.random.default_rng(0)
    schema = {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3}
    grammar = grammar_text(StructuredOutputsParams(json=schema))
    used, fresh = (
        GrammarCompiler(lambda: tokenizer, vocab_size=VOCAB_SIZE, eos_token_ids=lambda _: EOS) for _ in range(2)
    )
    for num_steps in (3, 25, 8) * 8:
        matcher = used.matcher(grammar)
        walk(matcher, rng, num_steps, [])
        if num_steps == 8:
            matcher.follow([*range(20, 40)], 0)
            assert matcher.error or matcher.matcher.is_stopped()
        matcher.release()
    for _ in range(5):
        ids: list[int] = []
        wanted = walk(fresh.matcher(grammar), rng, 20, ids)
        np.testing.assert_array_equal(walk(used.matcher(grammar), rng, 20, ids), wanted)
