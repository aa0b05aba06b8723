"""Penalties, biases, allowed ids, bad words and log probabilities through the engine, against Hugging Face's logits."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from tests.models.checkpoints import hf_logits
from vjax import LLM, FlatLogprobs, SamplingParams
from vjax.outputs import CompletionOutput, RequestOutput
from vjax.weights.hub import resolve_model_path

pytest.importorskip("torch", reason="Hugging Face in torch is the oracle")
pytestmark = pytest.mark.usefixtures("shared_programs")

MODEL = str(resolve_model_path("vjax-tiny"))
NUM_TOKENS = 24
PLENTY, FEW = 200, 17
TEXTS = [
    "def read_lines(path):\n",
    "class Stack:\n    def push(self, item):\n        self",
    "import os\nimport sys\n",
    "for i in range(10):\n    print(i)\nfor i in range(10):\n    print(i)\n",
    "x = [1, 2, 3",
]


def make_llm(**options) -> LLM:
    limits = {"max_model_len": 128, "max_num_seqs": 8, "num_gpu_blocks_override": PLENTY}
    return LLM(MODEL, dtype="float32", **{**limits, **options})


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with make_llm(max_logprobs=-1) as llm:
        yield llm


def greedy(**options) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, **options)


def generate(llm: LLM, params, texts=TEXTS):
    return llm.generate(texts, params, use_tqdm=False)


def oracle(prompt_ids: list[int], output: CompletionOutput) -> np.ndarray:
    """Hugging Face's logits f64 [tokens, V] before each token of the output."""
    ids = [*prompt_ids, *output.token_ids[:-1]]
    return hf_logits(MODEL, ids)[len(prompt_ids) - 1 :].astype(np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_hugging_faces(llm: LLM, temperature: float):
    words = [text + tail for text, tail in itertools.product(TEXTS, ("", "#", "    return", " a = "))]
    params = SamplingParams(temperature=temperature, max_tokens=8, seed=3, logprobs=5, ignore_eos=True)
    for output in generate(llm, params, words):
        completion = output.outputs[0]
        wanted = log_softmax(oracle(output.prompt_token_ids, completion))
        assert completion.logprobs is not None and len(completion.logprobs) == len(completion.token_ids) == 8
        total = 0.0
        for token, entry, row in zip(completion.token_ids, completion.logprobs, wanted, strict=True):
            order = np.argsort(-row, kind="stable")
            first, *others = entry
            assert first == token and list(dict.fromkeys([token, *order[:5].tolist()])) == [first, *others]
            assert entry[token].rank == 1 + order.tolist().index(token)
            for i, logprob in entry.items():
                assert abs(logprob.logprob - row[i]) < 1e-3
                assert logprob.rank == 1 + order.tolist().index(i)
            total += row[token]
        assert completion.cumulative_logprob == pytest.approx(total, abs=5e-3)


@pytest.mark.parametrize(("logprobs", "entries"), [(0, 1), (1, 1), (30, 30), (-1, 4096)])
def test_number_of_logprobs(llm: LLM, logprobs: int, entries: int):
    (output,) = generate(llm, greedy(logprobs=logprobs), TEXTS[:1])
    assert {len(entry) for entry in output.outputs[0].logprobs} == {entries}
    wanted = log_softmax(oracle(output.prompt_token_ids, output.outputs[0]))
    for entry, row in zip(output.outputs[0].logprobs, wanted, strict=True):
        np.testing.assert_allclose([p.logprob for p in entry.values()], [row[i] for i in entry], atol=1e-3)


def test_named_logprobs_come_after_the_others(llm: LLM):
    params = [greedy(logprob_token_ids=[7, 300]), greedy(logprobs=1, logprob_token_ids=[9]), greedy()]
    named, both, neither = generate(llm, params, TEXTS[:3])
    wanted = log_softmax(oracle(named.prompt_token_ids, named.outputs[0]))
    for token, entry, row in zip(named.outputs[0].token_ids, named.outputs[0].logprobs, wanted, strict=True):
        assert list(entry) == list(dict.fromkeys([token, 7, 300]))
        assert abs(entry[300].logprob - row[300]) < 1e-3
    assert all(9 in entry for entry in both.outputs[0].logprobs)
    assert neither.outputs[0].logprobs is None and neither.outputs[0].cumulative_logprob is None


@pytest.mark.parametrize(("k", "budget"), [(0, 512), (3, 16), (-1, 16)])
def test_prompt_logprobs_are_hugging_faces(llm: LLM, k: int, budget: int):
    """Of prompts in one piece and in many, before and after they are in the prefix cache."""
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=k)
    with make_llm(max_logprobs=-1, max_num_batched_tokens=budget) as llm:
        outputs = generate(llm, greedy()), *(generate(llm, params) for _ in range(2))
    assert all(output.prompt_logprobs is None for output in outputs[0])
    for output in (*outputs[1], *outputs[2]):
        ids, found = output.prompt_token_ids, output.prompt_logprobs
        wanted = log_softmax(hf_logits(MODEL, ids)[:-1].astype(np.float64))
        assert found is not None and len(found) == len(ids) and found[0] is None
        for token, entry, row in zip(ids[1:], found[1:], wanted, strict=True):
            order = np.argsort(-row, kind="stable").tolist()
            top = order if k == -1 else order[:k]
            assert list(entry)[:8] == list(dict.fromkeys([token, *top]))[:8] and len(entry) == len({token, *top})
            assert entry[token].rank == 1 + order.index(token)
            assert all(abs(entry[i].logprob - row[i]) < 1e-3 for i in entry)


def test_flat_logprobs(llm: LLM):
    """They hold what the lists of dicts hold; the token is there twice where it is one of the most probable ones."""
    options = {"temperature": 1.0, "seed": 5, "max_tokens": 6, "logprobs": 2, "prompt_logprobs": 1}
    options |= {"logprob_token_ids": [7]}
    (nested,) = generate(llm, SamplingParams(**options), TEXTS[:1])
    (flat,) = generate(llm, SamplingParams(**options, flat_logprobs=True), TEXTS[:1])
    for got, wanted, size in (
        (flat.outputs[0].logprobs, nested.outputs[0].logprobs, 4),
        (flat.prompt_logprobs, nested.prompt_logprobs, 2),
    ):
        assert isinstance(got, FlatLogprobs) and list(got) == [entry or {} for entry in wanted]
        assert got.end_indices == [*got.start_indices[1:], len(got.token_ids)]
        sizes = [end - start for start, end in zip(got.start_indices, got.end_indices, strict=True)]
        assert sizes == [size if entry else 0 for entry in wanted]
    assert flat.outputs[0].cumulative_logprob == nested.outputs[0].cumulative_logprob


@pytest.mark.parametrize("mode", ["processed_logprobs", "raw_logits", "processed_logits"])
def test_logprobs_mode(mode: str):
    params = greedy(logprobs=2, logit_bias={300: 50.0})
    with make_llm(logprobs_mode=mode) as llm:
        (output,) = generate(llm, params, TEXTS[:1])
    assert set(output.outputs[0].token_ids) == {300}
    values = oracle(output.prompt_token_ids, output.outputs[0])
    values[:, 300] += 50.0 if mode.startswith("processed") else 0.0
    values = log_softmax(values) if mode.endswith("logprobs") else values
    got = [entry[300].logprob for entry in output.outputs[0].logprobs]
    np.testing.assert_allclose(got, values[:, 300], atol=2e-3)


def processed(logits: np.ndarray, prompt: list[int], before: list[int], params: SamplingParams, llm: LLM) -> np.ndarray:
    """vLLM's definitions, in numpy."""
    logits = logits.copy()
    if params.allowed_token_ids:
        logits[[i for i in range(len(logits)) if i not in set(params.allowed_token_ids)]] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    for token in {*prompt, *before}:
        factor = params.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token, count in Counter(before).items():
        logits[token] -= count * params.frequency_penalty + params.presence_penalty
    tokenizer = llm.get_tokenizer()
    for text in params.bad_words or []:
        for word in (
            tokenizer.encode(text, add_special_tokens=False),
            tokenizer.encode(" " + text, add_special_tokens=False),
        ):
            if before[len(before) - len(word) + 1 :] == word[:-1] and len(before) >= len(word) - 1:
                logits[word[-1]] = -np.inf
    return logits


FEATURES = {
    "frequency": {"frequency_penalty": 0.8},
    "presence": {"presence_penalty": 1.5},
    "repetition": {"repetition_penalty": 1.4},
    "bias": {"logit_bias": {262: -5.0, 300: 3.0}},
    "allowed": {"allowed_token_ids": list(range(256, 400))},
    "bad_words": {"bad_words": ["return", "self", "lines from"]},
}
FEATURES["all"] = {name: value for options in FEATURES.values() for name, value in options.items()}


@pytest.mark.parametrize("name", FEATURES)
def test_processors(llm: LLM, name: str):
    params = greedy(**FEATURES[name])
    plain = [output.outputs[0].token_ids for output in generate(llm, greedy())]
    changed = 0
    for output, before in zip(generate(llm, params), plain, strict=True):
        ids = output.outputs[0].token_ids
        changed += ids != before
        for i, row in enumerate(oracle(output.prompt_token_ids, output.outputs[0])):
            wanted = processed(row, output.prompt_token_ids, ids[:i], params, llm)
            assert wanted[ids[i]] >= wanted.max() - 1e-3, f"token {i}"
    assert changed


def test_requests_do_not_share_them(llm: LLM):
    """In one batch, and one after the other in the same row."""
    plain = [output.outputs[0].token_ids for output in generate(llm, greedy())]
    biased = [output.outputs[0].token_ids for output in generate(llm, greedy(**FEATURES["bias"]))]
    kinds = [greedy(**FEATURES["all"], logprobs=2), greedy(), greedy(logprobs=1), greedy(**FEATURES["bias"]), greedy()]
    together = [output.outputs[0].token_ids for output in generate(llm, kinds)]
    assert together[0] != plain[0]
    assert together[1:] == [plain[1], plain[2], biased[3], plain[4]]
    assert [output.outputs[0].token_ids for output in generate(llm, greedy())] == plain


KINDS = {
    "frequency": {"frequency_penalty": 0.8, "logprobs": 2},
    "bad_words": {"bad_words": ["return", "self"], "logprobs": 2},
    "logprobs": {"logprobs": 2},
    "prompt_logprobs": {"prompt_logprobs": 2, "logprobs": 0},
    "seeded": {"temperature": 0.9, "seed": 5, "top_p": 0.8, "presence_penalty": 0.5, "logprobs": 2},
}


@pytest.fixture(scope="module")
def expected(llm: LLM):
    return generate_kinds(llm)


def generate_kinds(llm: LLM) -> list[RequestOutput]:
    common = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    params = [SamplingParams(**{**common, **KINDS[kind]}) for kind in KINDS for _ in TEXTS]
    return generate(llm, params, TEXTS * len(KINDS))


@pytest.mark.parametrize(
    ("overlap", "blocks", "budget"),
    [(True, PLENTY, 48), (False, PLENTY, 8192), (True, FEW, 8192), (False, FEW, 48)],
)
def test_modes_agree(expected: list[RequestOutput], overlap: bool, blocks: int, budget: int):
    options = {"async_scheduling": overlap, "num_gpu_blocks_override": blocks, "max_num_batched_tokens": budget}
    with make_llm(**options, disable_log_stats=False) as llm:
        outputs = generate_kinds(llm)
        preemptions = next(m.value for m in llm.get_metrics() if m.name == "vjax:num_preemptions")
    assert (preemptions > 0) == (blocks == FEW)
    for one, other in zip(outputs, expected, strict=True):
        got, wanted = one.outputs[0], other.outputs[0]
        assert got.token_ids == wanted.token_ids
        assert got.cumulative_logprob == pytest.approx(wanted.cumulative_logprob, rel=1e-3)
        assert values(one.prompt_logprobs) == pytest.approx(values(other.prompt_logprobs), rel=1e-3)


def values(prompt_logprobs) -> list[float]:
    return [p.logprob for entry in prompt_logprobs or () for p in (entry or {}).values()]
