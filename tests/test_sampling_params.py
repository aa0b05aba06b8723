from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vjax.errors import VjaxValidationError
from vjax.sampling_params import RepetitionDetectionParams, RequestOutputKind, SamplingParams


def test_defaults_are_vllms():
    p = SamplingParams()
    assert (p.n, p.temperature, p.top_p, p.top_k, p.min_p, p.seed) == (1, 1.0, 1.0, 0, 0.0, None)
    assert (p.max_tokens, p.min_tokens, p.ignore_eos, p.stop, p.stop_token_ids) == (16, 0, False, [], [])
    assert p.detokenize and p.skip_special_tokens and p.spaces_between_special_tokens
    assert p.output_kind is RequestOutputKind.CUMULATIVE and not p.include_stop_str_in_output
    assert not p.is_greedy and p.all_stop_token_ids == frozenset()


def test_values_are_normalised():
    p = SamplingParams(stop="end", stop_token_ids=[7, 3, 7], seed=-1, top_k=-1, max_tokens=None)
    assert (p.stop, p.stop_token_ids, p.seed, p.top_k, p.max_tokens) == (["end"], [7, 3], None, 0, None)
    p = SamplingParams(max_tokens=np.int64(5), temperature=np.float32(0.5), stop=("a", "b"))  # pyright: ignore
    assert type(p.max_tokens) is int and type(p.temperature) is float and p.stop == ["a", "b"]


def test_greedy_switches_truncation_off():
    p = SamplingParams(temperature=0, top_p=0.5, top_k=10, min_p=0.1)
    assert p.is_greedy and (p.top_p, p.top_k, p.min_p) == (1.0, 0, 0.0)


def test_tiny_temperatures_are_raised():
    p = SamplingParams(temperature=1e-6, top_k=5)
    assert p.temperature == 0.01 and p.top_k == 5 and not p.is_greedy


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"n": 0}, ["n=0", "[1, 16384]"]),
        ({"n": 16385}, ["n=16385", "16384"]),
        ({"n": True}, ["n=True", "integer"]),
        ({"n": 2, "temperature": 0}, ["n=2", "must be 1", "temperature above 0"]),
        ({"temperature": -0.1}, ["temperature=-0.1", "[0.0, 2.0]"]),
        ({"temperature": 2.1}, ["temperature=2.1", "[0.0, 2.0]"]),
        ({"temperature": float("nan")}, ["temperature=nan", "[0.0, 2.0]"]),
        ({"temperature": "1"}, ["temperature='1'", "number"]),
        ({"top_p": 0}, ["top_p=0", "(0.0, 1.0]", "1 to switch it off"]),
        ({"top_p": 1.01}, ["top_p=1.01", "(0.0, 1.0]"]),
        ({"top_k": -2}, ["top_k=-2", "at least -1", "0 to switch it off"]),
        ({"top_k": 1.5}, ["top_k=1.5", "integer"]),
        ({"min_p": 1.5}, ["min_p=1.5", "[0.0, 1.0]"]),
        ({"seed": 2**63}, [f"seed={2**63}", "integer"]),
        ({"max_tokens": 0}, ["max_tokens=0", "at least 1", "None"]),
        ({"min_tokens": -1}, ["min_tokens=-1", "at least 0"]),
        ({"min_tokens": 5, "max_tokens": 4}, ["min_tokens=5", "max_tokens=4", "lower min_tokens or raise max_tokens"]),
        ({"stop": ["a", ""]}, ["stop=['a', '']", "empty string"]),
        ({"stop": [1]}, ["stop=[1]", "list of strings"]),
        ({"stop": "a", "detokenize": False}, ["stop=['a']", "detokenize=True", "stop_token_ids"]),
        ({"stop_token_ids": [3, -1]}, ["stop_token_ids=[3, -1]", "-1 is not one"]),
        ({"stop_token_ids": 3}, ["stop_token_ids=3", "list of token ids"]),
        ({"ignore_eos": 1}, ["ignore_eos=1", "True or False"]),
        ({"presence_penalty": 2.1}, ["presence_penalty=2.1", "[-2.0, 2.0]", "0 to switch it off"]),
        ({"frequency_penalty": "a"}, ["frequency_penalty='a'", "[-2.0, 2.0]"]),
        ({"repetition_penalty": 0}, ["repetition_penalty=0", "(0.0, ", "1 to switch it off"]),
        ({"logprobs": -2}, ["logprobs=-2", "at least -1", "-1 for the whole vocabulary"]),
        ({"logprob_token_ids": list(range(129))}, ["logprob_token_ids", "129 ids", "at most 128", "logprobs=-1"]),
        ({"logit_bias": [1]}, ["logit_bias=[1]", "must map token ids to numbers"]),
        ({"logit_bias": {"a": 1}}, ["logit_bias={'a': 1}", "'a': 1 is not such a pair"]),
        ({"logit_bias": {-1: 1}}, ["-1: 1 is not such a pair"]),
        ({"logit_bias": {1: float("nan")}}, ["1: nan is not such a pair"]),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, ["logit_bias", "1025 ids", "at most 1024"]),
        ({"allowed_token_ids": []}, ["allowed_token_ids=[]", "leaves no token", "None to allow all"]),
        ({"allowed_token_ids": [-1]}, ["allowed_token_ids=[-1]", "-1 is not one"]),
        ({"bad_words": [""]}, ["bad_words=['']", "empty string"]),
        ({"bad_words": ["x"] * 129}, ["bad_words", "129 texts", "at most 128"]),
        ({"output_kind": "delta"}, ["output_kind='delta'", "RequestOutputKind.DELTA"]),
        ({"stream_interval": 0}, ["stream_interval=0", "at least 1", "None or 1"]),
        ({"stream_interval": 2.0}, ["stream_interval=2.0", "integer"]),
        ({"skip_reading_prefix_cache": 1}, ["skip_reading_prefix_cache=1", "True, False or None"]),
        ({"repetition_detection": 3}, ["repetition_detection=3", "RepetitionDetectionParams", "min_count"]),
        ({"repetition_detection": {"max_pattern": 3}}, ["{'max_pattern': 3}", "max_pattern_size, min_pattern_size"]),
    ],
)
def test_bad_values_are_refused(fields, texts):
    with pytest.raises(VjaxValidationError) as e:
        SamplingParams(**fields)
    assert all(text in str(e.value) for text in texts), str(e.value)
    assert e.value.parameter in fields


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"max_pattern_size": -1}, ["max_pattern_size=-1", "at least 0"]),
        ({"max_pattern_size": 3, "min_pattern_size": 4, "min_count": 2}, ["min_pattern_size=4", "max_pattern_size=3"]),
        ({"min_pattern_size": 1}, ["min_pattern_size=1", "at most max_pattern_size=0"]),
        ({"max_pattern_size": 3}, ["min_count=0", "at least 2"]),
        ({"max_pattern_size": 3, "min_count": 1}, ["min_count=1", "at least 2", "max_pattern_size=0"]),
        ({"max_pattern_size": 3, "min_count": 2.5}, ["min_count=2.5", "integer"]),
    ],
)
def test_bad_repetition_detection(fields, texts):
    for make in (RepetitionDetectionParams, lambda **f: SamplingParams(repetition_detection=f)):  # pyright: ignore
        with pytest.raises(VjaxValidationError) as e:
            make(**fields)
        assert all(text in str(e.value) for text in texts), str(e.value)


def test_repetition_detection_may_be_a_mapping():
    detection = RepetitionDetectionParams(max_pattern_size=4, min_count=3)
    fields: dict[str, Any] = {"max_pattern_size": np.int64(4), "min_count": 3}
    assert SamplingParams(repetition_detection=fields).repetition_detection == detection  # pyright: ignore
    assert detection.is_on and detection.min_num_tokens == 3
    assert not RepetitionDetectionParams().is_on
    p = SamplingParams(repetition_detection=detection, stream_interval=3, skip_reading_prefix_cache=True)
    assert p.clone() == p and not p.reads_prefix_cache
    assert SamplingParams().reads_prefix_cache and SamplingParams(skip_reading_prefix_cache=False).reads_prefix_cache


@pytest.mark.parametrize(
    ("name", "value", "default"),
    [
        ("prompt_logprob_token_ids", [1], "None"),
        ("prompt_logprob_start", 0, "None"),
        ("watermarking", {}, "None"),
        ("routed_experts_prompt_start", 0, "None"),
        ("trace_decode_token_ids", [1], "None"),
        ("skip_clone", True, "False"),
    ],
)
def test_unsupported_fields_exist_and_are_refused(name, value, default):
    assert repr(getattr(SamplingParams(), name)) == default
    with pytest.raises(VjaxValidationError, match="is not supported yet; leave it at its default") as e:
        SamplingParams(**{name: value})
    assert str(e.value).startswith(f"{name}={value!r} ") and str(e.value).endswith(f"{default}.")


def test_unsupported_fields_accept_what_asks_for_nothing():
    p = SamplingParams(presence_penalty=0, repetition_penalty=1, bad_words=[], logit_bias={}, extra_args={})
    assert p == SamplingParams()


def test_biases_are_clamped_and_json_keys_are_numbers():
    assert SamplingParams(logit_bias={"3": 1000, 4: -200.5}).logit_bias == {3: 100.0, 4: -100.0}  # pyright: ignore


def test_clone_shares_nothing_and_validates_again():
    p = SamplingParams(stop=["a"], stop_token_ids=[1], seed=5)
    q = p.clone()
    assert q == p and q.stop is not p.stop and q.stop_token_ids is not p.stop_token_ids
    p.max_tokens = 0
    with pytest.raises(VjaxValidationError, match="max_tokens=0"):
        p.clone()


def test_from_optional_takes_none_for_the_default():
    assert SamplingParams.from_optional(max_tokens=None, top_p=None, n=2) == SamplingParams(n=2)
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams.from_optional(best_of=2)


def test_add_stop_token_ids_keeps_order_and_drops_repetitions():
    p = SamplingParams(stop_token_ids=[4])
    p.add_stop_token_ids([9, 4, 2])
    assert p.stop_token_ids == [4, 9, 2] and p.all_stop_token_ids == {2, 4, 9}


def test_repr_shows_what_was_set():
    assert repr(SamplingParams()) == "SamplingParams()"
    assert repr(SamplingParams(temperature=0, stop="x")) == "SamplingParams(temperature=0.0, stop=['x'])"
