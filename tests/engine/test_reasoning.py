"""Grammars of an engine with reasoning_config: they hold from the end of the reasoning on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vjax import LLM, SamplingParams, StructuredOutputsParams
from vjax.engine.core import EngineCore

#: The texts around "reasoning"; the model writes the end behind a list of parameters by itself.
START, END = "import", "):\n"
OPENS, CLOSES = "def read_lines(path", "x = 1\ny = 2"


TAGS = {"reasoning_start_str": START, "reasoning_end_str": END}
#: As in test_structured_outputs.py, whose compiled programs are found.
SMALL = {"max_model_len": 128, "max_num_seqs": 8, "num_gpu_blocks_override": 200, "dtype": "float32"}
EOS = (0, 1)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("vjax-tiny", **SMALL, reasoning_config=TAGS) as llm:
        yield llm


def params(regex: str | None = None, **options) -> SamplingParams:
    kinds = None if regex is None else StructuredOutputsParams(regex=regex)
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 24, "structured_outputs": kinds, **options})


def generate(llm: LLM, prompts, params) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


def encode(llm: LLM, *texts: str) -> list[int]:
    return [token for text in texts for token in llm.get_tokenizer().encode(text, add_special_tokens=False)]


def text(llm: LLM, token_ids: list[int]) -> str:
    return llm.get_tokenizer().decode(token_ids, skip_special_tokens=True)


def test_the_grammar_follows_the_end_tag(llm: LLM):
    """It comes at once where the model closes a list of parameters, later, and never."""
    end, regex = encode(llm, END), "[0-9]{3}-[A-F]{2}"
    prompts = [OPENS, "def add(a, b", CLOSES]
    plain = generate(llm, prompts, params(max_tokens=24, ignore_eos=True))
    got = generate(llm, prompts, params(regex, ignore_eos=False))
    where = [next((i for i in range(24) if ids[i : i + len(end)] == end), None) for ids in plain]
    assert where[0] is not None and where[2] is None, where
    for ids, free, at in zip(got, plain, where, strict=True):
        if at is None:
            assert ids == free[: len(ids)], "without an end tag all is free"
            continue
        at += len(end)
        assert ids[:at] == free[:at] and ids[-1] in EOS
        assert len(text(llm, ids[at:])) == 6 and text(llm, ids[at:])[3] == "-"


def test_a_prompt_decides_by_its_last_tag(llm: LLM):
    regex = "[0-9]{4}"
    closed = encode(llm, CLOSES, END)
    opened = encode(llm, CLOSES, END, START)
    first, second = generate(llm, [closed, opened], params(regex))
    assert len(text(llm, first)) == 4 and text(llm, first).isdigit()
    assert second == generate(llm, [opened], params())[0][: len(second)] and not text(llm, second).isdigit()


def test_a_tag_may_begin_in_the_prompt(llm: LLM):
    end = encode(llm, END)
    (ids,) = generate(llm, [[*encode(llm, CLOSES, START), *end[:1]]], params("[0-9]{4}", logit_bias={end[1]: 100.0}))
    assert ids[0] == end[1] and text(llm, ids[1:]).isdigit() and len(text(llm, ids[1:])) == 4


def test_a_budget_ends_the_reasoning_and_the_grammar_follows(llm: LLM):
    end, prompt = encode(llm, END), encode(llm, CLOSES, START)
    (free,) = generate(llm, [prompt], params(ignore_eos=True))
    for budget in (0, 5):
        (ids,) = generate(llm, [prompt], params('"[a-z]{4}"', thinking_token_budget=budget, min_tokens=3))
        assert ids[: budget + len(end)] == free[:budget] + end
        answer = text(llm, ids[budget + len(end) :])
        assert len(answer) == 6 and answer[0] == answer[-1] == '"' and ids[-1] in EOS


def test_a_start_tag_in_the_answer_is_text(llm: LLM):
    """Nothing is forced any more, though the budget is spent."""
    prompt, answer = encode(llm, CLOSES, START), f"{START} {START} "
    (ids,) = generate(llm, [prompt], params(f"({START} ){{2}}[a-z]{{9}}", thinking_token_budget=2))
    written = text(llm, ids[2 + len(encode(llm, END)) :])
    assert written.startswith(answer) and len(written) == len(answer) + 9


def test_each_completion_reasons_for_itself(llm: LLM):
    """Sampled ones end at different places, or not at all."""
    end = encode(llm, END)
    options = {"n": 8, "temperature": 1.2, "seed": 1, "thinking_token_budget": 16, "max_tokens": 40}
    prompt = {"prompt_token_ids": encode(llm, f"{START} os\ndef add(a")}
    (output,) = llm.generate([prompt], params("[0-9]{5}", **options), use_tqdm=False)
    places = set()
    for completion in output.outputs:
        ids = completion.token_ids
        at = next(i for i in range(40) if ids[i : i + len(end)] == end)
        places.add(at)
        answer = text(llm, ids[at + len(end) :])
        assert completion.finish_reason == "stop" and answer.isdigit() and len(answer) == 5
    assert len(places) > 1


def mixture(llm: LLM, reset_every: int = 0) -> list[list[int]]:
    """Tokens of requests that reason, answer, do neither or never did, some sampled.

    Args:
        reset_every: Steps after which all of them have to start over.
    """
    prompts = [
        encode(llm, "x = 1\n" * 4, *parts) for parts in ([START], [END], [OPENS], [START, " os\n", OPENS], [START])
    ]
    sampled = {"temperature": 0.9, "seed": 4}
    kinds = [
        params("[a-f]{20}", thinking_token_budget=6),
        params("[a-f]{20}", **sampled),
        params('"[a-z ]{30}"', max_tokens=40, **sampled),
        params("[0-9]{20}", thinking_token_budget=9),
        params(ignore_eos=True),
    ]
    engine, tokens, steps = llm.llm_engine, {}, 0
    for i, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
        engine.add_request(str(i), prompt, kind)
    while engine.has_unfinished_requests():
        tokens |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
        steps += 1
        if reset_every and steps % reset_every == 0:
            assert engine.reset_prefix_cache(reset_running_requests=True)
    return [tokens[str(i)] for i in range(len(prompts))]


def test_modes_agree(llm: LLM, monkeypatch):
    """Overlapped and plain, and with preemptions at any place."""
    expected = mixture(llm)
    assert mixture(llm, 5) == mixture(llm, 9) == expected
    core = llm.llm_engine._core
    assert isinstance(core, EngineCore)
    monkeypatch.setattr(core, "step", core._step)
    assert mixture(llm) == mixture(llm, 7) == expected
