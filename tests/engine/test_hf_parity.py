"""Greedy ids equal Hugging Face's in float32, for every supported architecture and rope variant."""

from __future__ import annotations

import numpy as np
import pytest

from tests.models.checkpoints import CHECKPOINTS, VOCAB_SIZE, hf_logits, make_checkpoint
from vjax import LLM, SamplingParams

pytest.importorskip("torch", reason="Hugging Face in torch is the oracle")

NUM_TOKENS = 64
PROMPT_LENGTHS = (1, 2, 15, 16, 17, 33, 64, 100, 300)


def _prompts() -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(3, VOCAB_SIZE, n).tolist() for n in PROMPT_LENGTHS]


def _hf_choices(path: str, prompt: list[int], ids: list[int]) -> list[int]:
    """Hugging Face's greedy choice after the prompt and after each of `ids` but the last. Where it equals `ids`, greedy
    decoding by Hugging Face gives `ids`, by induction."""
    return hf_logits(path, prompt + ids[:-1])[len(prompt) - 1 :].argmax(axis=-1).tolist()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_ids_equal_hugging_face(name, tmp_path_factory):
    path = make_checkpoint(name, tmp_path_factory.getbasetemp() / "checkpoints")
    prompts = [{"prompt_token_ids": p} for p in _prompts()]
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(
        path,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=400,
        max_num_seqs=4,
        max_num_batched_tokens=16,  # one mixed bucket to compile
        kv_cache_memory_bytes=32 << 20,
    ) as llm:
        batched = llm.generate(prompts, params, use_tqdm=False)
        alone = [llm.generate(p, params, use_tqdm=False)[0] for p in prompts[::4]]
    for prompt, output in zip(_prompts(), batched, strict=True):
        ids = list(output.outputs[0].token_ids)
        assert len(ids) == NUM_TOKENS
        assert ids == _hf_choices(path, prompt, ids), f"prompt of {len(prompt)}"
    for one, many in zip(alone, batched[::4], strict=True):
        assert one.outputs[0].token_ids == many.outputs[0].token_ids
