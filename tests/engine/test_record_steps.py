"""`record_steps`: what the records say is what the requests got."""

from __future__ import annotations

import pytest

from vjax import LLM, SamplingParams

pytestmark = pytest.mark.usefixtures("shared_programs")

SMALL = {"max_model_len": 128, "max_num_seqs": 2, "max_num_batched_tokens": 32, "num_gpu_blocks_override": 24}


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_records_of_steps(async_scheduling):
    prompt = list(range(100, 140))
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    with LLM("vjax-tiny", use_v1=True, async_scheduling=async_scheduling, **SMALL) as llm:
        prompts = [{"prompt_token_ids": prompt[: 40 - i]} for i in range(3)]
        with llm.llm_engine.record_steps() as steps, llm.llm_engine.record_steps(blocks=False) as counted:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        recorded = len(steps)
        llm.generate(prompts, params, use_tqdm=False)
        assert len(steps) == recorded, "recorded after the end"

    assert [step.step_id for step in steps] == list(range(recorded))
    assert [step.counts() for step in steps] == [step.counts() for step in counted]
    assert not any(step.cached_block_ids or r.block_ids for step in counted for r in step.requests)
    assert steps[0].num_waiting == 2 and steps[0].counts()["prefill_tokens"] == 32  # a chunk of the first prompt
    for output in outputs:
        mine = [r for step in steps for r in step.requests if r.request_id == output.request_id]
        cached = output.num_cached_tokens
        assert sum(r.num_prefill_tokens for r in mine) == len(output.prompt_token_ids) - cached
        assert sum(r.num_tokens for r in mine) == len(output.prompt_token_ids) - cached + 4
        assert all(r.num_cached_tokens == cached for r in mine)
        assert all(16 * len(r.block_ids) >= r.num_computed_tokens for r in mine)
    # The second prompt finds two blocks of the first, which still runs.
    together = next(step for step in steps if len(step.requests) == 2)
    first, second = together.requests
    assert first.block_ids[:2] == second.block_ids[:2] and set(first.block_ids[:2]) <= together.cached_block_ids
