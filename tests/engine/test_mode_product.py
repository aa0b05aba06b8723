"""Token ids do not depend on the mode, the prefix cache, the token budget, overlap or memory pressure."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests.models.checkpoints import VOCAB_SIZE, hf_greedy, make_checkpoint
from vjax import LLM, SamplingParams

pytest.importorskip("torch", reason="Hugging Face in torch is the oracle")
pytestmark = pytest.mark.usefixtures("shared_programs")

MAX_MODEL_LEN = 192
NUM_TOKENS = 24
PLENTY, FEW = 200, 22
BUDGETS = (16, 48, 8192)


def _configs() -> list[Any]:
    configs = []
    for prefix, budget, overlap, blocks in itertools.product((True, False), BUDGETS, (True, False), (PLENTY, FEW)):
        configs.append(
            {
                "use_v1": True,
                "enable_prefix_caching": prefix,
                "max_num_batched_tokens": budget,
                "async_scheduling": overlap,
                "num_gpu_blocks_override": blocks,
            }
        )
    for blocks in (PLENTY, FEW):
        v0 = {"use_v1": False, "num_gpu_blocks_override": blocks}
        configs += [v0, v0 | {"enable_prefix_caching": True}]
        configs += [v0 | {"enable_chunked_prefill": True, "max_num_batched_tokens": b} for b in BUDGETS]
    return [pytest.param(c, id="-".join(f"{k.split('_')[-1]}={v}" for k, v in c.items())) for c in configs]


def _prompts() -> list[list[int]]:
    """Different lengths; some share their first 40 tokens, two are the same."""
    rng = np.random.default_rng(3)
    shared = rng.integers(3, VOCAB_SIZE, 40).tolist()
    tails = [rng.integers(3, VOCAB_SIZE, n).tolist() for n in (1, 8, 25)]
    others = [rng.integers(3, VOCAB_SIZE, n).tolist() for n in (1, 16, 47, 100)]
    return [*(shared + t for t in tails), shared + tails[1], *others]


def _params() -> list[SamplingParams]:
    """For each prompt a greedy, a seeded and a seeded and truncated request."""
    common = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.9, "seed": 11},
        {"temperature": 1.1, "seed": 12, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    ]
    return [SamplingParams(**common, **kind) for kind in kinds]


def _generate(llm: LLM) -> list[list[list[int]]]:
    """Token ids by kind of request, then by prompt."""
    prompts = [{"prompt_token_ids": p} for p in _prompts()]
    work = [(p, k) for k in _params() for p in prompts]
    outputs = llm.generate([p for p, _ in work], [k for _, k in work], use_tqdm=False)
    ids = [o.outputs[0].token_ids for o in outputs]
    return [ids[i : i + len(prompts)] for i in range(0, len(ids), len(prompts))]


def _engine(checkpoint: str, **config: Any) -> LLM:
    return LLM(
        checkpoint,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=8,
        disable_log_stats=False,
        **config,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint("llama-gqa", tmp_path_factory.mktemp("product"))


@pytest.fixture(scope="module")
def expected(checkpoint):
    """Greedy ids from Hugging Face; seeded ids from requests that ran alone, one after another."""
    greedy = [hf_greedy(checkpoint, p, NUM_TOKENS) for p in _prompts()]
    with _engine(checkpoint, enable_prefix_caching=False, async_scheduling=False) as llm:
        seeded = [
            [llm.generate({"prompt_token_ids": p}, params, use_tqdm=False)[0].outputs[0].token_ids for p in _prompts()]
            for params in _params()[1:]
        ]
    return [greedy, *seeded]


@pytest.mark.parametrize("config", _configs())
def test_same_ids(config, checkpoint, expected):
    with _engine(checkpoint, **config) as llm:
        cold = _generate(llm)
        warm = _generate(llm)
        scheduler = llm.llm_engine._core.scheduler
        scheduler.check_integrity()
        metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    assert cold == expected
    assert warm == expected
    if config["num_gpu_blocks_override"] == FEW and config["use_v1"]:
        assert metrics["vjax:num_preemptions"] > 0
    if config.get("enable_prefix_caching") and config["num_gpu_blocks_override"] == PLENTY:
        assert metrics["vjax:prefix_cache_hits"] > 0
