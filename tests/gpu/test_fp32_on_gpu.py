"""float32 on the GPU: greedy ids equal Hugging Face's, so nothing is rounded to TF32 or bfloat16 on the way."""

from __future__ import annotations

import numpy as np
import pytest

from tests.gpu.engines import generated_ids, greedy, make_llm
from tests.gpu.hf_oracle import greedy_ids
from tests.models.checkpoints import VOCAB_SIZE

pytestmark = pytest.mark.gpu

NAMES = ("llama-llama3", "llama-biases", "llama-head80", "mistral-window", "qwen2", "qwen3")
LENGTHS = (1, 16, 33, 100, 300)
NUM_TOKENS = 48


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(3, VOCAB_SIZE, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def answers(prompts, tmp_path_factory):
    return greedy_ids(NAMES, prompts, NUM_TOKENS, tmp_path_factory.mktemp("oracle"))


@pytest.mark.parametrize("name", NAMES)
def test_greedy_ids_equal_hugging_face(name, prompts, answers):
    path, expected = answers[name]
    with make_llm(
        path, skip_tokenizer_init=True, dtype="float32", max_model_len=400, max_num_seqs=8, max_num_batched_tokens=128
    ) as llm:
        assert generated_ids(llm, prompts, greedy(NUM_TOKENS)) == expected
