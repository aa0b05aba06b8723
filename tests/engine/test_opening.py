"""Forwards whose first layers are a program of their own: the same tokens as in one program."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from vjax import LLM, SamplingParams
from vjax.runner import buckets as buckets_module
from vjax.runner.buckets import Buckets, ForwardBucket
from vjax.runner.programs import OpeningBucket, make_program

KWARGS = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64}


def run() -> tuple[LLM, list[Any]]:
    """An engine, and outputs of prompts of one and several chunks, some of which share blocks."""
    rng = np.random.default_rng(7)
    shared = rng.integers(3, 1000, 40).tolist()
    prompts = [rng.integers(3, 1000, n).tolist() for n in (1, 9, 63, 64, 150)]
    prompts += [shared + rng.integers(3, 1000, n).tolist() for n in (3, 3, 30)]
    kinds = [
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=5, top_p=0.9, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=1),
    ]
    llm = LLM("vjax-tiny", **KWARGS)
    work = [({"prompt_token_ids": p}, k) for k in kinds for p in prompts]
    return llm, llm.generate([p for p, _ in work], [k for _, k in work], use_tqdm=False)


@pytest.fixture
def with_openings(monkeypatch):
    """Engines on the CPU, too, open forwards with their first layer."""
    monkeypatch.setattr(buckets_module, "_opening", lambda num_tokens, num_layers: 1)


def test_the_same_outputs(request, shared_programs):
    plain, wanted = run()
    with plain:
        assert not any(bucket.opening for bucket in plain.llm_engine._core.runner.executables.buckets.mixed)
    request.getfixturevalue("with_openings")
    opened, got = run()
    with opened:
        executables = opened.llm_engine._core.runner.executables
        assert all(bucket.opening == 1 for bucket in executables.buckets.mixed)
        ready = [key for key, _ in executables.ready()]
        assert any(isinstance(key, OpeningBucket) for key in ready)
        # Prompt log probabilities need every hidden state: that forward is one program.
        assert any(isinstance(key, ForwardBucket) and key.keeps_hidden and not key.opening for key in ready)
    assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in wanted]
    for one, other in zip(got, wanted, strict=True):
        assert one.num_cached_tokens == other.num_cached_tokens
        if one.prompt_logprobs is not None:
            for mine, theirs in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
                assert {i: p.logprob for i, p in mine.items()} == {i: p.logprob for i, p in theirs.items()}


def test_warm_up_runs_an_opening_with_its_forward(with_openings):
    with LLM("vjax-tiny", **KWARGS) as llm:
        llm.llm_engine.warm_up()
        executables = llm.llm_engine._core.runner.executables
        openings = [key for key, _ in executables.ready() if isinstance(key, OpeningBucket)]
        assert [key.forward for key in openings] == [b for b in executables.buckets.mixed[::-1] if b.opening]
        (output,) = llm.generate([{"prompt_token_ids": [5] * 30}], SamplingParams(max_tokens=3), use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 3
        assert llm.llm_engine.num_compilations_while_serving == 0


def test_what_an_opening_leaves_is_what_its_forward_takes(with_openings):
    with LLM("vjax-tiny", **KWARGS) as llm:
        step = llm.llm_engine._core.runner.step
        for bucket in llm.llm_engine._core.runner.executables.buckets.mixed:
            program = make_program(step, OpeningBucket(bucket), None)
            *_, opened = jax.eval_shape(program.function, *program.arguments)
            specs = step.opened_specs(bucket)
            assert jax.tree.structure(opened) == jax.tree.structure(specs)
            assert jax.tree.leaves(opened) == jax.tree.leaves(specs)


def test_which_buckets_open():
    buckets = Buckets.build(max_num_batched_tokens=16384, max_num_seqs=1024, platform="gpu", num_layers=32)
    opened = {(bucket.num_tokens, bucket.num_seqs): bucket.opening for bucket in buckets.mixed}
    assert opened[64, 64] == opened[512, 512] == 8  # a quarter of the layers at most
    assert opened[1024, 1024] == 4 and opened[2048, 64] == 2 and opened[8192, 64] == 1
    # Steps of many sequences follow other steps, and the longest take long in any case.
    assert opened[2048, 1024] == opened[8192, 1024] == opened[16384, 1024] == 0
    assert not any(bucket.opening for bucket in buckets.decode)
    few = Buckets.build(max_num_batched_tokens=16384, max_num_seqs=1024, platform="gpu", num_layers=3)
    assert not any(bucket.opening for bucket in few.mixed)
