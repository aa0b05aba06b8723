"""Completions of the bundled model that keep to a JSON schema, a regular expression, a grammar or a list of texts."""

from __future__ import annotations

import ast
import json
import logging
import re
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from tests.config.json_schema import accepts
from tests.structured.schemas import random_schema
from vjax import LLM, SamplingParams, StructuredOutputsParams, VjaxValidationError

pytestmark = pytest.mark.usefixtures("shared_programs")

#: As in test_sampling_features.py, whose compiled programs are found.
SMALL = {"max_model_len": 128, "max_num_seqs": 8, "num_gpu_blocks_override": 200, "dtype": "float32"}
PROMPT = "x = 1\n"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("vjax-tiny", **SMALL) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_fails(caplog, request):
    """A step that fails is survived, and logged."""
    yield
    if "steps_may_fail" in request.fixturenames:
        return
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def constrained(max_tokens: int = 100, *, temperature: float = 1.0, seed: int = 0, n: int = 1, **fields):
    kinds = StructuredOutputsParams(**fields)
    return SamplingParams(temperature=temperature, seed=seed, n=n, max_tokens=max_tokens, structured_outputs=kinds)


def complete(llm: LLM, params, prompts=None):
    return llm.generate(prompts or [PROMPT] * len(params), params, use_tqdm=False)


def check(output, valid: Callable[[str], bool]) -> None:
    for completion in output.outputs:
        assert completion.finish_reason == "stop" and completion.token_ids[-1] in (0, 1), completion
        assert completion.stop_reason in (None, 1)
        assert valid(completion.text), completion.text


def test_json_schemas(llm: LLM):
    schemas = [random_schema(seed) for seed in range(20)]
    params = [
        constrained(seed=i, json=json.dumps(schema), whitespace_pattern=" ?")
        if i % 2
        else constrained(seed=i, json=schema, disable_any_whitespace=True)
        for i, schema in enumerate(schemas)
    ]
    for output, schema in zip(complete(llm, params), schemas, strict=True):
        check(output, lambda text, schema=schema: accepts(schema, json.loads(text)))


REGEXES = [
    r"[A-Z]{3}-[0-9]{2,4}",
    r"(0|[1-9][0-9]{0,2})(\.(0|[1-9][0-9]{0,2})){3}",
    r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])",
    r"[a-z]{1,8}@[a-z]{1,8}\.(com|org)",
    r"(ab|ba){2,5}(é|ü)?",
]


def balanced(text: str) -> bool:
    for _ in range(len(text)):
        text = text.replace("()", "")
    return not text


#: A grammar and what tells whether a text is of its language.
GRAMMARS: list[tuple[str, Callable[[str], bool]]] = [
    (
        'start: sum\nsum: term ("+" term){0,3}\nterm: NUMBER | "(" NUMBER "-" NUMBER ")"\nNUMBER: /[1-9][0-9]{0,2}/',
        lambda text: isinstance(eval(compile(ast.parse(text, mode="eval"), "", "eval")), int),
    ),
    ('start: pair{1,5}\npair: "(" ")" | "(" "(" ")" ")"', balanced),
    (
        'start: "def " NAME "(" [NAME ("," " " NAME){0,2}] "):\\n    return " NAME "\\n"\nNAME: /v[a-z]{1,6}/',
        lambda text: isinstance(ast.parse(text).body[0], ast.FunctionDef),
    ),
    (
        'root ::= "[" item (", " item)? "]"\nitem ::= "\\"" [a-z] [a-z]? [a-z]? "\\"" | [0-9] [0-9]?',
        lambda text: 1 <= len(ast.literal_eval(re.sub(r"\b0(\d)", r"\1", text))) <= 2,
    ),
    ('root ::= ("yes" | "no") "." [ ]?', lambda text: text.rstrip(" ") in ("yes.", "no.")),
]


def test_regular_expressions_grammars_and_choices(llm: LLM):
    choices = ["north", "south by east", "süd", "the end\n"]
    fields = [{"regex": regex} for regex in REGEXES] + [{"grammar": grammar} for grammar, _ in GRAMMARS]
    params = [constrained(seed=i, **f) for i, f in enumerate(fields)]
    params += [constrained(seed=seed, choice=choices) for seed in range(4)]
    outputs = complete(llm, params)
    for output, regex in zip(outputs[:5], REGEXES, strict=True):
        check(output, lambda text, regex=regex: re.fullmatch(regex, text) is not None)
    for output, (_, valid) in zip(outputs[5:10], GRAMMARS, strict=True):
        check(output, valid)
    for output in outputs[10:]:
        check(output, choices.__contains__)


def test_any_object_and_tool_calls(llm: LLM):
    """Text is free until a call begins, which a bias has it do again and again."""
    schema = {"type": "object", "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["x"]}
    tag = {"structures": [{"begin": "<call>", "schema": schema, "end": "</call>"}], "triggers": ["<"]}
    options = {"disable_any_whitespace": True, "disable_additional_properties": True}
    tags = constrained(30, temperature=0, structural_tag=tag, **options)
    tags.logit_bias = {llm.get_tokenizer().encode("<", add_special_tokens=False)[0]: 100.0}
    call, anything = complete(llm, [tags, constrained(24, json_object=True, disable_any_whitespace=True)])
    text = call.outputs[0].text
    assert re.match(r'(<call>\{"x":[0-9]\}</call>)+', text), text
    assert anything.outputs[0].text.startswith("{")


def test_one_bad_grammar_is_refused_alone(llm: LLM):
    """With `generate` the whole call is; in the engine the request that brings it."""
    good, bad = constrained(choice=["good"]), constrained(regex="(a")
    with pytest.raises(VjaxValidationError, match=r"(?s)prompts\[1\].*regex='\(a' is refused by .*unclosed group"):
        complete(llm, [good, bad])
    engine = llm.llm_engine
    assert not engine.has_unfinished_requests()
    engine.add_request("a", PROMPT, good)
    for params in (bad, constrained(json={"type": "array", "uniqueItems": True})):
        with pytest.raises(VjaxValidationError, match="refused by llguidance"):
            engine.add_request("b", PROMPT, params)
    engine.add_request("c", PROMPT, good)
    texts = {}
    while engine.has_unfinished_requests():
        texts |= {output.request_id: output.outputs[0].text for output in engine.step() if output.finished}
    assert texts == {"a": "good", "c": "good"}


def test_a_grammar_that_cannot_be_followed_ends_its_own_request(llm: LLM, monkeypatch):
    """llguidance has limits that only show while it runs."""
    from vjax.structured.matcher import GrammarMatcher

    calls = []

    def error(self) -> str:
        calls.append(self)
        return "too complex" if self is calls[0] and calls.count(self) == 3 else ""

    monkeypatch.setattr(GrammarMatcher, "error", property(error))
    params = [constrained(json_object=True), constrained(choice=["yes"]), SamplingParams(temperature=0, max_tokens=9)]
    failed, good, plain = complete(llm, params)
    assert failed.outputs[0].finish_reason == "error" and len(failed.outputs[0].token_ids) == 2
    assert good.outputs[0].text == "yes" and len(plain.outputs[0].token_ids) == 9


@pytest.fixture
def steps_may_fail() -> None:
    pass


def test_a_mask_that_cannot_be_filled_fails_its_step_alone(llm: LLM, monkeypatch, steps_may_fail):
    """The forward is on the device then, and tokens of the step before have been taken."""
    from vjax.structured.matcher import MaskFiller

    fill, plain = MaskFiller.fill, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    calls = []

    def fails_once(self, mask, matchers):
        calls.append(len(matchers))
        if len(calls) == 3:
            raise OSError("no memory")
        fill(self, mask, matchers)

    monkeypatch.setattr(MaskFiller, "fill", fails_once)
    # Of nine, one waits, and is not in the step that fails.
    failed = complete(llm, [plain, *[constrained(regex="[a-z]{9}")] * 8], [PROMPT] * 9)
    assert [output.outputs[0].finish_reason for output in failed] == ["error"] * 8 + ["stop"]
    assert {len(output.outputs[0].token_ids) for output in failed[:8]} == {2}
    assert len(failed[8].outputs[0].text) == 9
    (again,) = complete(llm, [constrained(choice=["yes"])])
    assert again.outputs[0].text == "yes"


def test_a_mask_is_written_again_when_its_step_has_run(llm: LLM, monkeypatch):
    """Two of them take turns. What an earlier step left in one is gone, in rows without a grammar too."""
    from vjax.structured.matcher import MaskFiller

    fill, plain = MaskFiller.fill, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    addresses = []

    def watched(self, mask, matchers):
        addresses.append(mask.ctypes.data)
        held = {row for row, _ in matchers}
        assert all((words == -1).all() for row, words in enumerate(mask) if row not in held)
        fill(self, mask, matchers)

    monkeypatch.setattr(MaskFiller, "fill", watched)
    (alone,) = complete(llm, [plain])
    assert not addresses
    complete(llm, [constrained(12, regex="[a-z]{99}")] * 8)
    beside, *_ = complete(llm, [plain, *[constrained(30, regex="[a-z]{99}")] * 3])
    assert beside.outputs[0].token_ids == alone.outputs[0].token_ids
    assert len(addresses) > 40 and len(set(addresses)) == 2
    assert sum(one == other for one, other in pairwise(addresses)) <= 1, "a step in flight reads it"


def test_each_completion_has_a_matcher_of_its_own(llm: LLM):
    (output,) = complete(llm, [constrained(n=4, regex="[a-z]{6}[0-9]", temperature=1.5)])
    check(output, lambda text: re.fullmatch("[a-z]{6}[0-9]", text) is not None)
    assert len({completion.text for completion in output.outputs}) == 4


def test_ends(llm: LLM):
    """min_tokens holds EOS back where the text may go on; what is complete ends. Stop ids and strings end a prefix."""
    longer, whole, cut, stopped, endless = (
        constrained(40, regex=r) for r in ("a+", "abc", "[ab]{9}", "[0-9]{9}", "ab")
    )
    longer.min_tokens = whole.min_tokens = 20
    longer.logit_bias = {0: 50.0, 1: 40.0}
    (stop,) = llm.get_tokenizer().encode("a" * 3)[-1:]
    cut.stop_token_ids, cut.logit_bias, cut.allowed_token_ids = [stop], {stop: 100.0}, [stop]
    stopped.stop = [str(digit) for digit in range(10)]
    endless.ignore_eos, endless.max_tokens = True, 12
    longer, whole, cut, stopped, endless = (
        output.outputs[0] for output in complete(llm, [longer, whole, cut, stopped, endless])
    )
    assert (len(longer.token_ids), longer.finish_reason) == (21, "stop") and set(longer.text) == {"a"}
    assert (whole.text, whole.finish_reason) == ("abc", "stop")
    assert (cut.stop_reason, cut.token_ids) == (stop, [stop])
    assert stopped.text == "" and stopped.stop_reason in "0123456789"
    assert endless.text == "ab" and (len(endless.token_ids), endless.finish_reason) == (12, "length")


@pytest.mark.parametrize(("overlap", "blocks", "budget"), [(True, 17, 48), (False, 200, 8192)])
def test_modes_agree(llm: LLM, overlap: bool, blocks: int, budget: int):
    """Of tokens and log probabilities, with preemptions where there are few blocks."""
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "minLength": 12}, "tags": {"type": "array", "minItems": 3}},
        "required": ["name", "tags"],
    }
    params = [constrained(40, seed=i, temperature=(0, 0.8)[i % 2], json=schema) for i in range(7)]
    params.append(SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    for p in params:
        p.logprobs = 2
    prompts = ["def read_lines(path):\n" * (1 + i) for i in range(len(params))]
    options = {"async_scheduling": overlap, "num_gpu_blocks_override": blocks, "max_num_batched_tokens": budget}
    with LLM("vjax-tiny", **{**SMALL, **options}, disable_log_stats=False) as other:
        outputs = complete(other, params, prompts)
        preemptions = next(m.value for m in other.get_metrics() if m.name == "vjax:num_preemptions")
    assert (preemptions > 0) == (blocks == 17)
    for one, two in zip(outputs, complete(llm, params, prompts), strict=True):
        got, wanted = one.outputs[0], two.outputs[0]
        assert got.token_ids == wanted.token_ids
        assert got.cumulative_logprob == pytest.approx(wanted.cumulative_logprob, rel=1e-3)


def test_logprobs_are_those_of_what_is_allowed(llm: LLM):
    params = constrained(temperature=0, choice=["true", "false"])
    params.logprobs = 3
    (output,) = complete(llm, [params])
    (completion,) = output.outputs
    assert completion.logprobs is not None
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert entry[token].rank == 1 and -1e30 < entry[token].logprob <= 0
    # Where one token is left its probability is 1.
    assert [entry[t].logprob for t, entry in zip(completion.token_ids, completion.logprobs, strict=True)].count(
        0.0
    ) >= 1


def test_without_a_tokenizer():
    with LLM("vjax-tiny", **SMALL, skip_tokenizer_init=True) as llm:
        with pytest.raises(VjaxValidationError, match=r"choice=\['a'\].*needs a tokenizer.*skip_tokenizer_init=True"):
            complete(llm, [constrained(choice=["a"])], [{"prompt_token_ids": [5, 6]}])
