"""Beam search against Hugging Face's `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.models.checkpoints import _hf_model
from vjax import LLM, BeamSearchParams, VjaxValidationError
from vjax.beam_search import BeamSearch
from vjax.logprobs import Logprob
from vjax.weights.hub import resolve_model_path

MODEL = str(resolve_model_path("vjax-tiny"))
NUM_TOKENS = 12
TEXTS = [
    "def read_lines(path):\n",
    "class Stack:\n    def push(self, item):\n        self",
    "import os\nimport sys\n",
    "x = [1, 2, 3",
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODEL, dtype="float32", max_model_len=128, max_num_seqs=16, num_gpu_blocks_override=300) as llm:
        yield llm


def hugging_face(ids: list[int], width: int, **options: Any) -> tuple[list[list[int]], list[float]]:
    """Sequences of tokens with the prompt, and their scores."""
    torch = pytest.importorskip("torch", reason="Hugging Face in torch is the oracle")
    from transformers import GenerationConfig

    config = GenerationConfig(
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    model = _hf_model(MODEL)
    model.generation_config = GenerationConfig()
    prompt = torch.tensor([ids])
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    return [row.tolist() for row in found.sequences], found.sequences_scores.tolist()


@pytest.mark.parametrize(("width", "penalty"), [(2, 1.0), (4, 0.0), (4, 2.0)])
def test_equals_hugging_face(llm: LLM, width: int, penalty: float):
    """Without EOS all sequences have one length, and both define the same search whatever the penalty."""
    params = BeamSearchParams(beam_width=width, max_tokens=NUM_TOKENS, ignore_eos=True, length_penalty=penalty)
    tokenizer = llm.get_tokenizer()
    for text, output in zip(TEXTS, llm.beam_search(TEXTS, params), strict=True):
        ids = tokenizer.encode(text)
        sequences, scores = hugging_face(ids, width, length_penalty=penalty, eos_token_id=None)
        assert [s.tokens for s in output.sequences] == sequences
        sums = [score * NUM_TOKENS**penalty for score in scores]
        np.testing.assert_allclose([s.cum_logprob for s in output.sequences], sums, atol=1e-3)
        for sequence in output.sequences:
            assert (sequence.finish_reason, sequence.stop_reason) == ("length", None)
            assert sequence.text == tokenizer.decode(sequence.tokens)
            own = [entry[token] for entry, token in zip(sequence.logprobs, sequence.tokens[len(ids) :], strict=True)]
            assert sum(p.logprob for p in own) == pytest.approx(sequence.cum_logprob)
            assert "".join(p.decoded_token for p in own) == sequence.text[len(text) :]
