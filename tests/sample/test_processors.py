"""What requests do to their logits, and log probabilities, against plain numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vjax.sample import processors
from vjax.sample.logprobs import largest, token_logprobs
from vjax.sample.processors import BadWords, History

ROWS, VOCAB, LENGTH, SLOTS = 5, 77, 40, 32
SEEDS = st.integers(0, 2**32 - 1)


def reference(case: dict) -> np.ndarray:
    """The definitions of vLLM's SamplingParams, one row after the other."""
    result = case["logits"].astype(np.float64)
    for r, logits in enumerate(result):
        n, p = case["num_tokens"][r], case["num_prompt_tokens"][r]
        tokens = case["tokens"][r][:n]
        if case["has_allowed"][r]:
            logits[[i for i in range(VOCAB) if i not in case["allowed"][r]]] = -np.inf
        for token, bias in case["biases"][r].items():
            logits[token] += bias
        for token in set(tokens):
            factor = case["repetition"][r]
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        for token in tokens[p:]:
            logits[token] -= case["frequency"][r]
        for token in set(tokens[p:]):
            logits[token] -= case["presence"][r]
        output = list(tokens[p:])
        for word in case["bad_words"][r]:
            if len(word) == 1 or output[-(len(word) - 1) :] == word[:-1]:
                logits[word[-1]] = -np.inf
    return result


def words_of(bad_words: list[list[list[int]]]) -> BadWords:
    token_ids, first, last = np.zeros((3, ROWS, SLOTS), np.int32)
    last -= 1
    for r, words in enumerate(bad_words):
        slot = 0
        for word in words:
            end = slot + len(word)
            token_ids[r, slot:end], first[r, slot:end], last[r, slot:end] = word, slot, end - 1
            slot = end
    return BadWords(jnp.asarray(token_ids), jnp.asarray(first), jnp.asarray(last))


def random_case(seed: int) -> dict:
    """A random batch; each row uses each processor or not."""
    rng = np.random.default_rng(seed)
    uses = [{name for name in ("allowed", "bias", "penalties", "words") if rng.random() < 0.5} for _ in range(ROWS)]
    small_vocab = rng.choice([3, 8, VOCAB])  # repetitions are frequent
    tokens = rng.integers(0, small_vocab, (ROWS, LENGTH)).astype(np.int32)
    num_prompt = rng.integers(1, LENGTH // 2, ROWS).astype(np.int32)
    num_tokens = (num_prompt + rng.integers(0, LENGTH // 2, ROWS)).astype(np.int32)
    allowed = [set(rng.choice(VOCAB, rng.integers(1, VOCAB), replace=False).tolist()) for _ in range(ROWS)]
    bits = np.zeros((ROWS, -(-VOCAB // 32) * 32), np.uint32)
    for r, ids in enumerate(allowed):
        bits[r, list(ids)] = 1
    bitmask = (bits.reshape(ROWS, -1, 32) << np.arange(32, dtype=np.uint32)).sum(-1, dtype=np.uint32).view(np.int32)
    biases, bad_words = [], []
    for r in range(ROWS):
        ids = rng.choice(VOCAB, 6, replace=False).tolist() if "bias" in uses[r] else []
        biases.append({i: float(np.float32(rng.normal(0, 20))) for i in ids})
        words = []
        for _ in range(5 if "words" in uses[r] else 0):
            length = int(rng.integers(1, 5))
            # Most of them end what the output ends with.
            tail = tokens[r, : num_tokens[r]][1 - length :].tolist() if length > 1 else []
            tail = tail if rng.random() < 0.7 and len(tail) == length - 1 else rng.integers(0, 3, length - 1).tolist()
            words.append([*tail, int(rng.integers(0, VOCAB))])
        bad_words.append(words)
    bias_ids = np.full((ROWS, 8), VOCAB, np.int32)
    bias = np.zeros((ROWS, 8), np.float32)
    for r, row in enumerate(biases):
        bias_ids[r, : len(row)], bias[r, : len(row)] = list(row), list(row.values())

    def penalties(none: float, low: float, high: float) -> np.ndarray:
        values = rng.uniform(low, high, ROWS)
        return np.where(["penalties" in use for use in uses], values, none).astype(np.float32)

    return {
        "logits": rng.normal(0, 5, (ROWS, VOCAB)).astype(np.float32),
        "tokens": tokens,
        "num_tokens": num_tokens,
        "num_prompt_tokens": num_prompt,
        "allowed": allowed,
        "biases": biases,
        "bad_words": bad_words,
        "has_allowed": np.array(["allowed" in use for use in uses]),
        "bitmask": jnp.asarray(bitmask),
        "bias_ids": jnp.asarray(bias_ids),
        "bias": jnp.asarray(bias),
        "history": History(jnp.asarray(tokens), jnp.asarray(num_tokens), jnp.asarray(num_prompt)),
        "words": words_of(bad_words),
        "repetition": penalties(1, 0.5, 2),
        "frequency": penalties(0, -2, 2),
        "presence": penalties(0, -2, 2),
    }


ARRAYS = "logits bitmask has_allowed bias_ids bias history words repetition frequency presence".split()


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_processors_are_their_definitions(seed: int):
    case = random_case(seed)
    arrays = {name: jax.tree.map(jnp.asarray, case[name]) for name in ARRAYS}
    np.testing.assert_allclose(run(arrays), reference(case), rtol=1e-5, atol=1e-5)


def run(arrays: dict) -> np.ndarray:
    return np.asarray(_process(arrays))


@jax.jit
def _process(case: dict) -> jax.Array:
    logits = processors.keep_allowed(case["logits"], case["bitmask"], case["has_allowed"])
    logits = processors.add_bias(logits, case["bias_ids"], case["bias"])
    penalties = {name: case[name] for name in ("repetition", "frequency", "presence")}
    logits = processors.penalize(logits, case["history"], **penalties)
    return processors.mask_bad_words(logits, case["history"], case["words"])


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_rows_that_use_nothing_stay_as_they_are(seed: int):
    case = random_case(seed)
    arrays = {name: jax.tree.map(jnp.asarray, case[name]) for name in ARRAYS}
    arrays |= {"has_allowed": np.zeros(ROWS, bool), "bias_ids": np.full((ROWS, 8), VOCAB, np.int32)}
    arrays |= {"repetition": np.ones(ROWS, np.float32), "words": words_of([[]] * ROWS)}
    arrays |= {name: np.zeros(ROWS, np.float32) for name in ("frequency", "presence")}
    np.testing.assert_array_equal(run(jax.tree.map(jnp.asarray, arrays)), case["logits"])


@pytest.mark.parametrize(("vocab", "k"), [(77, 20), (4096, 20), (5000, 1), (5000, 39), (128, 0)])
@pytest.mark.parametrize("ties", [False, True])
def test_largest(vocab: int, k: int, ties: bool):
    rng = np.random.default_rng(vocab + k)
    values = rng.integers(0, 50, (4, vocab)).astype(np.float32) if ties else rng.normal(0, 1, (4, vocab))
    values = np.asarray(values, np.float32)
    values[0, 5:] = -np.inf
    top, ids = largest(jnp.asarray(values), k)
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(np.asarray(top), np.take_along_axis(values, order, axis=1))
    finite = np.isfinite(np.take_along_axis(values, order, axis=1))
    np.testing.assert_array_equal(np.asarray(ids)[finite], order[finite])


def test_token_logprobs():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (6, 500)).astype(np.float32)
    values = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))
    tokens = rng.integers(0, 500, 6).astype(np.int32)
    got = token_logprobs(jnp.asarray(values), jnp.asarray(tokens), 5)
    wanted = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    for r, token in enumerate(tokens):
        order = np.argsort(-wanted[r], kind="stable")
        assert abs(got.logprob[r] - wanted[r, token]) < 1e-4
        assert got.rank[r] == 1 + list(order).index(token)
        assert np.asarray(got.top_ids[r]).tolist() == order[:5].tolist()
        np.testing.assert_allclose(got.top_logprobs[r], wanted[r, order[:5]], atol=1e-4)
