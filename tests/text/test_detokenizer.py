from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vjax.sampling_params import SamplingParams
from vjax.text.detokenizer import IncrementalDetokenizer, NoDetokenizer, make_detokenizer
from vjax.text.stop_strings import StopStrings
from vjax.text.tokenizer import Tokenizer

relaxed = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
#: Letters repeat, so that stop strings overlap each other and the ends of tokens.
texts = st.text(alphabet="abc o你好😀𝄞\n", max_size=30)


@pytest.fixture
def byte_level(tokenizer_of) -> Tokenizer:
    return tokenizer_of("byte_level")


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def earliest_match(text: str, stops: list[str], gate: int) -> tuple[int, int, str] | None:
    """(end, start, string) of the match that completes first after `gate`, by looking everywhere."""
    matches = [
        (start + len(s), order, start, s)
        for order, s in enumerate(stops)
        for start in range(len(text))
        if text.startswith(s, start) and start + len(s) > gate
    ]
    if not matches:
        return None
    end, _, start, string = min(matches)
    return end, start, string


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("family", ["byte_level", "sentencepiece"])
@relaxed
@given(data=st.data())
def test_streaming_equals_decoding_everything_and_cutting(tokenizer_of, family, delta, data):
    tokenizer = tokenizer_of(family)
    prompt = tokenizer.encode("hello")
    ids = ids_of(tokenizer, data.draw(texts))
    full = tokenizer.decode(prompt + ids)[len("hello") :]
    stops = data.draw(st.lists(st.one_of(st.text(alphabet="abc o你好😀", min_size=1, max_size=4)), max_size=3))
    if full and data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(full) - 1))
        stops.append(full[start : start + data.draw(st.integers(1, 6))])
    min_tokens = data.draw(st.integers(0, 4))
    include = data.draw(st.booleans())
    params = SamplingParams(
        max_tokens=100, stop=stops, min_tokens=min_tokens, include_stop_str_in_output=include, temperature=0
    )

    gate = len(tokenizer.decode(prompt + ids[:min_tokens]).rstrip("\ufffd")) - len("hello")
    match = earliest_match(full, stops, gate)
    expected = full if match is None else full[: match[0] if include else match[1]]

    detokenizer = IncrementalDetokenizer(tokenizer, prompt, params)
    shown, stop, position = "", None, 0
    while True:
        count = data.draw(st.integers(1, 5))
        new, position = ids[position : position + count], position + count
        finished = position >= len(ids)
        stop = detokenizer.update(new, finished)
        piece = detokenizer.get_next_output_text(finished or stop is not None, delta)
        if not delta:
            assert piece.startswith(shown)
        shown = shown + piece if delta else piece
        assert expected.startswith(shown)
        if finished or stop is not None:
            break
    assert shown == detokenizer.text == expected
    assert stop == (match[2] if match else None)
    kept = detokenizer.token_ids
    assert kept == ids[: len(kept)]
    if match is None:
        assert kept == ids
    else:  # the fewest tokens whose text holds the match
        assert tokenizer.decode(prompt + kept)[len("hello") :].startswith(full[: match[0]])
        shorter = tokenizer.decode(prompt + kept[:-1])[len("hello") :].rstrip("\ufffd")
        assert len(shorter) < match[0] or "\ufffd" in full


@relaxed
@given(data=st.data())
def test_any_token_ids_without_stop_strings(byte_level, data):
    ids = data.draw(st.lists(st.integers(0, len(byte_level) - 1), max_size=40))
    delta = data.draw(st.booleans())
    detokenizer = IncrementalDetokenizer(byte_level, [0], SamplingParams(max_tokens=100))
    shown = ""
    for i, token_id in enumerate(ids):
        detokenizer.update([token_id], finished=i == len(ids) - 1)
        piece = detokenizer.get_next_output_text(i == len(ids) - 1, delta)
        shown = shown + piece if delta else piece
    assert shown == detokenizer.text == byte_level.decode(ids)
    assert detokenizer.token_ids == ids


def test_earliest_completing_stop_wins_and_ties_go_by_order():
    def find(text: str, *stops: str):
        return StopStrings(stops).push(text)

    assert find("abcd", "abcd", "bc").string == "bc"
    assert find("abcd", "bcd", "cd").string == "bcd"
    assert find("abcd", "cd", "bcd").string == "cd"
    assert find("aab", "aab", "ab") == ("aab", 0, 3)
    assert find("xyz", "q") is None


def test_stop_string_across_updates():
    stops = StopStrings(["ENDE"])
    assert stops.push("...EN") is None
    assert stops.push("D") is None
    assert stops.push("E and on") == ("ENDE", -3, 1)


def test_hold_back_while_streaming(byte_level):
    params = SamplingParams(stop=["o w"], temperature=0)
    detokenizer = IncrementalDetokenizer(byte_level, [0], params)
    ids = ids_of(byte_level, "abcdef")
    detokenizer.update(ids)
    assert detokenizer.get_next_output_text(False, True) == "abcd"
    assert detokenizer.get_next_output_text(False, True) == ""
    assert detokenizer.get_next_output_text(False, False) == "abcd"
    detokenizer.update([], finished=True)
    assert detokenizer.get_next_output_text(True, True) == "ef"


def test_nothing_is_held_back_when_the_stop_string_stays(byte_level):
    params = SamplingParams(stop=["abc"], include_stop_str_in_output=True)
    detokenizer = IncrementalDetokenizer(byte_level, [0], params)
    assert detokenizer.update(ids_of(byte_level, "ab")) is None
    assert detokenizer.get_next_output_text(False, True) == "ab"
    assert detokenizer.update(ids_of(byte_level, "cab")) == "abc"
    assert detokenizer.get_next_output_text(True, True) == "c"
    assert detokenizer.text == "abc"


def test_tokens_after_the_match_are_dropped(byte_level):
    params = SamplingParams(stop=["b"])
    detokenizer = IncrementalDetokenizer(byte_level, [0], params)
    a, b, c = (byte_level.convert_tokens_to_ids(t) for t in "abc")
    assert detokenizer.update([a, c, b, c, c]) == "b"
    assert detokenizer.token_ids == [a, c, b]
    assert detokenizer.text == "ac"


@pytest.mark.parametrize("stop", [None, ["zzz"]])
def test_the_stop_token_is_in_the_ids_and_not_in_the_text(byte_level, stop):
    a, b = (byte_level.convert_tokens_to_ids(t) for t in "ab")
    for include, text in ((False, "a"), (True, "ab")):
        params = SamplingParams(stop=stop, include_stop_str_in_output=include)
        detokenizer = IncrementalDetokenizer(byte_level, [0], params)
        detokenizer.update([a, b], finished=True, stop_terminated=True)
        assert detokenizer.token_ids == [a, b]
        assert detokenizer.text == text


@pytest.mark.parametrize("stop", [None, ["zzz"]])
def test_special_tokens(byte_level, stop):
    end, a = (byte_level.convert_tokens_to_ids(t) for t in ("<|end|>", "a"))
    for skip, text in ((True, "aa"), (False, "a<|end|>a")):
        params = SamplingParams(stop=stop, skip_special_tokens=skip)
        detokenizer = IncrementalDetokenizer(byte_level, [0], params)
        detokenizer.update([a, end, a], finished=True)
        assert detokenizer.text == text == byte_level.decode([a, end, a], skip)


def test_an_incomplete_character_ends_as_a_replacement(byte_level):
    first = ids_of(byte_level, "𝄞")[:2]
    for stop in (None, ["zzz"]):
        detokenizer = IncrementalDetokenizer(byte_level, [0], SamplingParams(stop=stop))
        detokenizer.update(first)
        assert detokenizer.text == ""
        detokenizer.update([], finished=True)
        assert detokenizer.text == detokenizer.text == byte_level.decode(first) == "\ufffd"


def test_without_text(byte_level):
    for detokenizer in (
        make_detokenizer(None, [0], SamplingParams()),
        make_detokenizer(byte_level, [0], SamplingParams(detokenize=False)),
    ):
        assert isinstance(detokenizer, NoDetokenizer)
        assert detokenizer.update([1, 2]) is None
        assert (detokenizer.token_ids, detokenizer.get_next_output_text(True, False)) == ([1, 2], "")
