"""Workloads: statistics, determinism, and what they are made of."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vjax.benchmarks import dataset_files, sharegpt, workloads
from vjax.errors import ConfigError

COMMON = {"vocab_size": 50, "seed": 3}


def lengths(requests):
    return np.array([[len(r.prompt_token_ids), r.output_len] for r in requests]).T


def test_random_lengths_and_ids():
    options = {"input_len": 100, "output_len": 40, "range_ratio": 0.5, **COMMON}
    requests = workloads.random_requests(2000, **options)
    inputs, outputs = lengths(requests)
    assert (inputs.min(), inputs.max(), outputs.min(), outputs.max()) == (50, 150, 20, 60)
    assert abs(inputs.mean() - 100) < 2 and abs(outputs.mean() - 40) < 1
    ids = np.concatenate([r.prompt_token_ids for r in requests])
    assert ids.min() == 0 and ids.max() == 49 and abs(ids.mean() - 24.5) < 0.2
    assert workloads.random_requests(2000, **options) == requests
    assert workloads.random_requests(2000, **options | {"seed": 4}) != requests


def test_fixed_lengths():
    inputs, outputs = lengths(workloads.random_requests(9, input_len=7, output_len=5, range_ratio=0.0, **COMMON))
    assert set(inputs) == {7} and set(outputs) == {5}


def test_no_length_is_zero():
    inputs, outputs = lengths(workloads.random_requests(200, input_len=1, output_len=1, range_ratio=0.9, **COMMON))
    assert inputs.min() == outputs.min() == 1


def test_sharegpt_like_means_are_the_published_ones():
    prompts, outputs = sharegpt.draw_lengths(np.random.default_rng(0), 200_000, 2048)
    assert prompts.mean() == pytest.approx(161.31, rel=0.01)
    assert outputs.mean() == pytest.approx(337.99, rel=0.01)
    assert prompts.min() == outputs.min() == 4 and prompts.max() <= 1024 and (prompts + outputs).max() <= 2048
    assert np.median(prompts) < 0.6 * prompts.mean()


def test_sharegpt_like_requests_fit_the_context():
    requests = workloads.sharegpt_like_requests(100, output_len=None, max_total_len=128, **COMMON)
    assert len(requests) == 100 and lengths(requests).sum(0).max() <= 128
    assert workloads.sharegpt_like_requests(100, output_len=None, max_total_len=128, **COMMON) == requests
    inputs, outputs = lengths(workloads.sharegpt_like_requests(100, output_len=100, max_total_len=128, **COMMON))
    assert set(outputs) == {100} and inputs.max() == 28
    with pytest.raises(ConfigError, match="max_model_len=31 is too short"):
        workloads.sharegpt_like_requests(1, output_len=None, max_total_len=31, **COMMON)


def test_prefix_repetition():
    requests = workloads.prefix_repetition_requests(
        10, num_prefixes=4, prefix_len=20, suffix_len=6, output_len=3, **COMMON
    )
    inputs, outputs = lengths(requests)
    assert set(inputs) == {26} and set(outputs) == {3}
    prefixes = [tuple(r.prompt_token_ids[:20]) for r in requests]
    assert sorted(prefixes.count(p) for p in set(prefixes)) == [2, 2, 3, 3]
    assert len({tuple(r.prompt_token_ids) for r in requests}) == 10


def test_shared_prefix_and_repetition():
    requests = workloads.shared_prefix_requests(50, prefix_len=9, min_len=10, max_len=20, output_len=2, **COMMON)
    inputs, _ = lengths(requests)
    assert (inputs.min(), inputs.max()) == (10, 20)
    assert len({tuple(r.prompt_token_ids[:9]) for r in requests}) == 1
    many = workloads.repeated(requests, 3, sort=False, seed=0)
    assert len(many) == 150 and all(many.count(r) >= 3 for r in requests) and many[:3] != [requests[0]] * 3
    assert (np.diff(lengths(workloads.repeated(requests, 3, sort=True, seed=0))[0]) >= 0).all()


# ---- files --------------------------------------------------------------------------------------------------------


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def conversation(*turns: object):
    return {"conversations": [{"from": "human", "value": turn} for turn in turns]}


def test_sharegpt_file(tmp_path):
    path = tmp_path / "sharegpt.json"
    usual = [conversation("question" + "?" * i, "answer" * 2, "more") for i in range(5)]
    unusual = [conversation("one turn only"), conversation("abc", "answer"), conversation("question", "x" * 500)]
    path.write_text(json.dumps(usual + unusual))
    options = {"max_total_len": 100, "encode": encode, "seed": 1}
    requests = dataset_files.sharegpt_requests(path, 5, output_len=None, **options)
    assert sorted(lengths(requests)[0]) == [8, 9, 10, 11, 12] and set(lengths(requests)[1]) == {12}
    assert dataset_files.sharegpt_requests(path, 5, output_len=None, **options) == requests
    assert set(lengths(dataset_files.sharegpt_requests(path, 2, output_len=7, **options))[1]) == {7}
    with pytest.raises(ConfigError, match="has 5 usable entries; pass --num-prompts 5 or less"):
        dataset_files.sharegpt_requests(path, 6, output_len=None, **options)


def test_custom_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "abc", "output_tokens": 5}\n\n{"prompt": "de"}\n{"prompt": "unused"}\n')
    options = {"default_output_len": 9, "encode": encode}
    assert dataset_files.custom_requests(path, 2, output_len=None, **options) == [
        workloads.Request(encode("abc"), 5),
        workloads.Request(encode("de"), 9),
    ]
    assert set(lengths(dataset_files.custom_requests(path, 3, output_len=2, **options))[1]) == {2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "must hold a JSON list of conversations, and holds a dict"),
        ('[{"turns": []}]', "every entry must be an object"),
        (json.dumps([conversation("a", 3)]), "every 'value' must be a text"),
    ],
)
def test_bad_sharegpt_file(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        dataset_files.sharegpt_requests(path, 1, output_len=None, max_total_len=100, encode=encode, seed=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "line 1, is not JSON"),
        ('{"prompt": "a"}\n["b"]', "line 2, must be a JSON object with a text under 'prompt'"),
        ('{"prompt": "a", "output_tokens": 0}', "line 1: output_tokens=0 must be an integer at least 1"),
    ],
)
def test_bad_custom_file(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        dataset_files.custom_requests(path, 3, output_len=None, default_output_len=1, encode=encode)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json cannot be read \(No such file"):
        dataset_files.sharegpt_requests(
            tmp_path / "none.json", 1, output_len=None, max_total_len=100, encode=encode, seed=0
        )
