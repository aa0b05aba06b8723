"""Shapes are finite: after warm-up nothing compiles, and no executable copies the KV cache."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pallas_kernels.hlo_checks import cache_copies
from vjax import LLM, SamplingParams
from vjax.runner.buckets import Buckets, ForwardBucket

KWARGS = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 67}


@pytest.fixture(scope="module")
def llm():
    with LLM("vjax-tiny", **KWARGS) as engine:
        engine.llm_engine.warm_up()
        yield engine


def _random_requests(count: int, vocab_size: int) -> tuple[list[dict], list[SamplingParams]]:
    rng = np.random.default_rng(0)
    prompts, params = [], []
    for _ in range(count):
        length = int(np.clip(rng.lognormal(2.5, 1.0), 1, 200))
        prompts.append({"prompt_token_ids": rng.integers(0, vocab_size, length).tolist()})
        kind = rng.integers(4)
        params.append(
            SamplingParams(
                temperature=0.0 if kind == 0 else 0.8,
                top_k=20 if kind >= 2 else 0,
                top_p=0.9 if kind >= 2 else 1.0,
                min_tokens=2 if kind == 3 else 0,
                max_tokens=int(rng.integers(2, 5)),
            )
        )
    return prompts, params


def test_no_compilation_after_warm_up(llm):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    prompts, params = _random_requests(1000, 1000)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert len(outputs) == 1000 and all(o.finished for o in outputs)
    assert compiled == []
    assert llm.llm_engine.num_compilations_while_serving == 0


def test_executables_update_the_cache_in_place(llm):
    executables = llm.llm_engine._core.runner.executables
    shapes = [k.shape for k, _ in executables.step.kv_specs()]
    layer_bytes = 2 * np.prod(shapes[0]) * 4
    for key in executables.all_keys():
        compiled = executables.compile(key)
        assert cache_copies(compiled.as_text(), shapes) == [], key
        if isinstance(key, ForwardBucket) and key.decode_only:
            assert compiled.memory_analysis().temp_size_in_bytes < layer_bytes, key


def test_a_planted_copy_is_found(llm):
    executables = llm.llm_engine._core.runner.executables
    bucket = executables.buckets.decode[0]
    specs = executables.step.kv_specs()

    def forward_that_keeps_the_old_cache(kv):
        return jax.tree.map(lambda a: a.at[0].add(1.0), kv), kv

    assert bucket.decode_only
    text = jax.jit(forward_that_keeps_the_old_cache, donate_argnums=0).lower(specs).compile().as_text()
    assert cache_copies(text, [specs[0][0].shape]) != []


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(("budget", "seqs"), [(16, 16), (48, 7), (2048, 64), (8448, 256), (16384, 1024)])
def test_buckets_cover_every_step(platform, budget, seqs):
    buckets = Buckets.build(max_num_batched_tokens=budget, max_num_seqs=seqs, platform=platform)
    for num_seqs in {1, 2, seqs // 2 or 1, seqs}:
        for num_tokens in {num_seqs, num_seqs + 1, (num_seqs + budget) // 2, budget}:
            if num_tokens > budget:
                continue
            bucket = buckets.forward_bucket(num_tokens, num_seqs)
            assert bucket.num_tokens >= num_tokens and bucket.num_seqs >= num_seqs
            assert bucket.decode_only == (num_tokens == num_seqs)
            family = buckets.decode if bucket.decode_only else buckets.mixed
            assert not any(num_tokens <= b.num_tokens < bucket.num_tokens for b in family)
        assert buckets.sample[-1] >= num_seqs
