"""Beam search against Hugging Face's `generate`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.models.checkpoints import hf_beam_search, hf_logits
from vjax import LLM, BeamSearchOutput, BeamSearchParams, SamplingParams, VjaxValidationError
from vjax.weights.hub import resolve_model_path

pytest.importorskip("torch", reason="Hugging Face in torch is the oracle")
pytestmark = pytest.mark.usefixtures("shared_programs")

MODEL = str(resolve_model_path("vjax-tiny"))
NUM_TOKENS = 6
TEXTS = ["def read_lines(path):\n", "class Stack:\n    def push(self, item):\n        self", "x = [1, 2, 3"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODEL, dtype="float32", max_model_len=128, max_num_seqs=8, num_gpu_blocks_override=200) as llm:
        yield llm


@pytest.mark.parametrize(("width", "penalty"), [(2, 1.0), (4, 2.0)])
def test_equals_hugging_face(llm: LLM, width: int, penalty: float):
    """Without EOS all sequences have one length, and both define the same search whatever the penalty."""
    params = BeamSearchParams(beam_width=width, max_tokens=NUM_TOKENS, ignore_eos=True, length_penalty=penalty)
    tokenizer = llm.get_tokenizer()
    with llm.llm_engine.record_steps(blocks=False) as steps:
        outputs = llm.beam_search(TEXTS, params)
    assert max(step.counts()["running"] for step in steps) == min(8, width * len(TEXTS)), "one batch of all beams"
    for text, output in zip(TEXTS, outputs, strict=True):
        ids = tokenizer.encode(text)
        sequences, scores = hf_beam_search(MODEL, ids, width, NUM_TOKENS, length_penalty=penalty)
        assert [s.tokens for s in output.sequences] == sequences
        sums = [score * NUM_TOKENS**penalty for score in scores]
        np.testing.assert_allclose([s.cum_logprob for s in output.sequences], sums, atol=1e-3)
        for sequence in output.sequences:
            assert (sequence.finish_reason, sequence.stop_reason) == ("length", None)
            assert sequence.text == tokenizer.decode(sequence.tokens)
            own = [entry[token] for entry, token in zip(sequence.logprobs, sequence.tokens[len(ids) :], strict=True)]
            assert sum(p.logprob for p in own) == pytest.approx(sequence.cum_logprob)
            assert text + "".join(p.decoded_token or "" for p in own) == sequence.text


@functools.cache
def hf_logprobs(ids: tuple[int, ...]) -> np.ndarray:
    logits = hf_logits(MODEL, list(ids))[-1].astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def reference(ids: list[int], width: int, eos: int, penalty: float, *, like_hf: bool) -> list[list[int]]:
    """vLLM's search in full, or (`like_hf`) with what Hugging Face's does otherwise at a length penalty of 0."""
    beams, completed = [(0.0, ids)], []
    for _ in range(NUM_TOKENS):
        found = []
        for total, tokens in beams:
            logprobs = hf_logprobs(tuple(tokens))
            found += [(total + logprobs[i], [*tokens, int(i)]) for i in np.argsort(-logprobs)[: 2 * width]]
        found.sort(key=lambda beam: -beam[0])
        ended = [beam for beam in (found[:width] if like_hf else found) if beam[1][-1] == eos]
        completed += ended
        beams = [beam for beam in found if beam[1][-1] != eos][:width]
    if like_hf:  # what is unfinished at the end is, too, if it is among the best of its step
        beams = [beam for beam in found[:width] if beam[1][-1] != eos]

    def score(beam: tuple[float, list[int]]) -> float:
        return beam[0] / (len(beam[1]) - (beam[1][-1] == eos)) ** penalty

    return [tokens for _, tokens in sorted([*completed, *beams], key=score, reverse=True)[:width]]


@pytest.mark.parametrize(("text", "eos"), [(TEXTS[0], 203), (TEXTS[2], 16)])
def test_end_of_sequence(llm: LLM, monkeypatch: pytest.MonkeyPatch, text: str, eos: int):
    """As vLLM defines it; and what Hugging Face defines otherwise is what the documentation says."""
    monkeypatch.setattr(type(llm.llm_engine), "eos_token_id", eos)
    ids = llm.get_tokenizer().encode(text)
    got = {}
    for penalty in (0.0, 1.0):
        params = BeamSearchParams(beam_width=2, max_tokens=NUM_TOKENS, length_penalty=penalty)
        (output,) = llm.beam_search(text, params)
        got[penalty] = [s.tokens for s in output.sequences]
        assert got[penalty] == reference(ids, 2, eos, penalty, like_hf=False)
        for sequence in output.sequences:
            stopped = sequence.tokens[-1] == eos
            assert (sequence.finish_reason, sequence.stop_reason) == (("stop", eos) if stopped else ("length", None))
            assert eos not in sequence.tokens[len(ids) : -1]
            shown = sequence.tokens[:-1] if stopped else sequence.tokens
            assert sequence.text == llm.get_tokenizer().decode(shown)
    assert any(s.finish_reason == "stop" for s in output.sequences)
    options: dict[str, Any] = {"eos_token_id": eos, "length_penalty": 0.0, "early_stopping": "never"}
    theirs, _ = hf_beam_search(MODEL, ids, 2, NUM_TOKENS, **options)
    assert theirs == reference(ids, 2, eos, 0.0, like_hf=True)


def tokens(outputs: list[BeamSearchOutput]) -> list[list[list[int]]]:
    return [[sequence.tokens for sequence in output.sequences] for output in outputs]


def test_modes_and_limits(llm: LLM):
    params = BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True, include_stop_str_in_output=True)
    together = tokens(llm.beam_search(TEXTS, params))
    assert tokens(llm.beam_search(TEXTS, params, concurrency_limit=2)) == together
    salted = [{"prompt_token_ids": llm.get_tokenizer().encode(text), "cache_salt": "a"} for text in TEXTS]
    assert tokens(llm.beam_search(salted, params)) == together
    (greedy,) = llm.generate(TEXTS[0], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)
    (one,) = llm.beam_search(TEXTS[0], BeamSearchParams(beam_width=1, max_tokens=5, ignore_eos=True))
    assert one.sequences[0].tokens == [*greedy.prompt_token_ids, *greedy.outputs[0].token_ids]
    (output,) = llm.beam_search([[7] * 124], BeamSearchParams(beam_width=2, max_tokens=50, ignore_eos=True))
    assert [(len(s.tokens), s.finish_reason) for s in output.sequences] == [(128, "length")] * 2
    assert llm.beam_search([], params) == []


def test_bad_input(llm: LLM):
    good = BeamSearchParams(beam_width=2, max_tokens=2)
    cases = [
        (lambda: BeamSearchParams(beam_width=0, max_tokens=1), "beam_width=0 must be an integer at least 1"),
        (lambda: BeamSearchParams(2, 2, structured_outputs={}), "structured_outputs={} is not supported"),
        (lambda: BeamSearchParams(2, 2, length_penalty=float("nan")), "length_penalty=nan must be a number"),
        (lambda: llm.beam_search(TEXTS, BeamSearchParams(11, 2)), "beam_width=11 needs the 22 most .* max_logprobs=22"),
        (lambda: llm.beam_search(TEXTS, SamplingParams()), "pass a BeamSearchParams"),
        (lambda: llm.beam_search(["a", [1] * 130], good), r"prompts\[1\]: The prompt \(length 130\)"),
        (lambda: llm.beam_search("a", good, concurrency_limit=0), "concurrency_limit=0 must be at least 1"),
    ]
    for call, text in cases:
        with pytest.raises(VjaxValidationError, match=text):
            call()
    assert llm.llm_engine.get_num_unfinished_requests() == 0
