"""Random tokens through the output processor: what is streamed is the text, no more and never earlier."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import accumulate, cycle, pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vjax.engine.input_processor import ProcessedRequest
from vjax.engine.output_processor import OutputProcessor
from vjax.messages import EngineOutput, EngineRequest
from vjax.outputs import RequestOutput
from vjax.sampling_params import RequestOutputKind, SamplingParams
from vjax.text.load import load_tokenizer
from vjax.text.tokenizer import Tokenizer
from vjax.weights.hub import resolve_model_path

DELTA, CUMULATIVE, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY
#: Three tokenizers make a thousand.
EXAMPLES = 334
#: Letters repeat, so that stop strings overlap with themselves; the others take two to four bytes.
ALPHABET = "aab \no你好😀𝄞é"


@cache
def bundled() -> Tokenizer:
    return load_tokenizer(None, model_dir=resolve_model_path("vjax-tiny"))


@dataclass
class Case:
    """A request, and the tokens that an engine gives it."""

    prompt: list[int]
    ids: list[int]
    #: Tokens in each step, over and over.
    steps: list[int]
    reason: str
    params: SamplingParams
    engine_interval: int


@dataclass
class Expected:
    text: str
    token_ids: list[int]
    stop: str | None


texts = st.text(alphabet=ALPHABET, max_size=10)
numbers = st.integers(0, 2**20)
#: A text without some tokens at its ends, which may be parts of a character; any tokens; a special one.
segments = st.one_of(
    st.tuples(texts, st.sampled_from([0, 0, 1]), st.sampled_from([0, 0, 1])),
    st.lists(numbers, min_size=1, max_size=3),
    numbers,
)
draws = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from(["hello", "", "<"]),
        "segments": st.lists(segments, max_size=5),
        "steps": st.sampled_from([[1], [1], [1], [2], [1, 5], [3, 1, 1], [100]]),
        "reason": st.sampled_from(["length", "stop", "error", "repetition"]),
        "engine_interval": st.sampled_from([1, 1, 4]),
        "stops": st.lists(st.text(alphabet=ALPHABET, min_size=1, max_size=4), max_size=2),
        # Parts of the text; with a character more they are met in part only, unless it happens to follow.
        "parts": st.lists(st.tuples(numbers, st.integers(1, 6), st.sampled_from(["", "", "a", "😀"])), max_size=2),
        "parts_first": st.booleans(),
        "min_tokens": st.sampled_from([0, 0, 0, 1, 5]),
        "include_stop_str_in_output": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "stream_interval": st.sampled_from([None, 1, 2, 3, 7, 100]),
        "output_kind": st.sampled_from([DELTA, DELTA, CUMULATIVE, FINAL_ONLY]),
    }
)


def case_of(tokenizer: Tokenizer, drawn: dict[str, Any]) -> Case:
    ids: list[int] = []
    for segment in drawn["segments"]:
        if isinstance(segment, tuple):
            text, first, last = segment
            encoded = tokenizer.encode(text, add_special_tokens=False)
            ids += encoded[first : len(encoded) - last]
        elif isinstance(segment, list):
            ids += [i % len(tokenizer) for i in segment]
        else:
            special = tokenizer.all_special_ids
            ids.append(special[segment % len(special)])
    ids = ids or tokenizer.encode("a", add_special_tokens=False)
    prompt = tokenizer.encode(drawn["prompt"]) or [0]
    full = "".join(pushed(tokenizer, prompt, ids, drawn["skip_special_tokens"]))
    parts = [full[i % len(full) :][:length] + extra for i, length, extra in drawn["parts"] if full]
    params = SamplingParams(
        max_tokens=1000,
        min_tokens=min(drawn["min_tokens"], len(ids)),
        stop=parts + drawn["stops"] if drawn["parts_first"] else drawn["stops"] + parts,
        include_stop_str_in_output=drawn["include_stop_str_in_output"],
        skip_special_tokens=drawn["skip_special_tokens"],
        stream_interval=drawn["stream_interval"],
        output_kind=drawn["output_kind"],
        seed=0,
    )
    return Case(prompt, ids, drawn["steps"], drawn["reason"], params, drawn["engine_interval"])


def pushed(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip_special_tokens: bool) -> list[str]:
    """What each token adds to the text, and what is left at the end."""
    stream = tokenizer.decode_stream(prompt, skip_special_tokens)
    return [*map(stream.push, ids), stream.flush()]


def expected_of(tokenizer: Tokenizer, case: Case) -> Expected:
    """The whole text, cut at the stop string that is complete first, by looking everywhere."""
    params, ids = case.params, case.ids
    if case.reason == "stop" and not params.include_stop_str_in_output:
        ids = ids[:-1]
    pieces = pushed(tokenizer, case.prompt, ids, params.skip_special_tokens)
    full, lengths = "".join(pieces), list(accumulate(map(len, pieces)))
    # What the last token leaves unfinished is its text too.
    gate = lengths[-1 if params.min_tokens >= len(ids) else params.min_tokens - 1] if params.min_tokens else 0
    assert isinstance(params.stop, list)
    matches = [
        (start + len(stop), order, start, stop)
        for order, stop in enumerate(params.stop)
        for start in range(len(full))
        if full.startswith(stop, start) and start + len(stop) > gate
    ]
    if not matches:
        return Expected(full, case.ids, None)
    end, _, start, stop = min(matches)
    last = next(i for i, length in enumerate(lengths) if length >= end)  # the token that completes it
    kept = ids[: last + 1] if last < len(ids) else case.ids
    return Expected(full[: end if params.include_stop_str_in_output else start], kept, stop)


def outputs_of(tokenizer: Tokenizer, case: Case) -> list[tuple[int, RequestOutput]]:
    """Every output, with the number of tokens that had arrived."""
    processor = OutputProcessor(tokenizer, stream_interval=case.engine_interval)
    request = EngineRequest("r", case.prompt, case.params, None, 0.0)
    processor.add_request(ProcessedRequest("r", "", case.prompt, case.params, [request], 0.0))
    outputs: list[tuple[int, RequestOutput]] = []
    position = 0
    for count in cycle(case.steps):
        new = case.ids[position : position + count]
        position += len(new)
        is_last = position == len(case.ids)
        shown, to_abort = processor.process([EngineOutput("r", new, case.reason if is_last else None)])
        outputs += [(position, output) for output in shown]
        finished = bool(shown) and shown[-1].finished
        assert to_abort == (["r"] if finished and not is_last else [])
        if finished or is_last:
            assert finished and processor.num_unfinished == 0
            return outputs
    raise AssertionError("unreachable")


def check(tokenizer: Tokenizer, case: Case) -> None:
    prompt, skip = case.prompt, case.params.skip_special_tokens
    before, whole = tokenizer.decode(prompt, skip), tokenizer.decode(prompt + case.ids, skip)
    if "\ufffd" not in whole or tokenizer is bundled():  # byte fallback replaces whole runs of bytes
        assert before + "".join(pushed(tokenizer, prompt, case.ids, skip)) == whole

    expected, outputs = expected_of(tokenizer, case), outputs_of(tokenizer, case)
    completions = [output.outputs[0] for _, output in outputs]
    kind, last = case.params.output_kind, completions[-1]
    assert [output.finished for _, output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert all(c.finish_reason is None for c in completions[:-1])
    reason = "stop" if expected.stop is not None else case.reason
    assert (last.finish_reason, last.stop_reason) == (reason, expected.stop)

    if kind is DELTA:
        seen = list(accumulate(c.text for c in completions))
        assert [i for c in completions for i in c.token_ids] == expected.token_ids
    else:
        seen = [c.text for c in completions]
        assert last.token_ids == expected.token_ids
    assert seen[-1] == expected.text
    # Nothing is shown that is taken back later: no part of a stop string, no half character.
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(seen))

    interval = max(case.engine_interval, case.params.stream_interval or 1)
    arrived = [position for position, _ in outputs]
    due = []
    for position in accumulate(cycle(case.steps)):
        if position >= arrived[-1]:
            break
        if kind is not FINAL_ONLY and (not due or position - due[-1] >= interval):
            due.append(position)
    assert arrived == [*due, arrived[-1]]


@pytest.mark.parametrize("name", ["bundled", "sentencepiece", "byte_level"])
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(drawn=draws)
def test_streams_show_the_text_and_no_stop_string(tokenizer_of, name, drawn):
    tokenizer = bundled() if name == "bundled" else tokenizer_of(name)
    check(tokenizer, case_of(tokenizer, drawn))
