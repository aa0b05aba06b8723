"""One bad request, a Ctrl-C or a failing device never takes the engine or other requests with it."""

from __future__ import annotations

import os
import signal

import pytest

from vjax import LLM, SamplingParams, VjaxValidationError
from vjax.errors import EngineStepError

pytestmark = pytest.mark.usefixtures("shared_programs")

PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = ["def add(a, b):", "import os", "class Node:", "for i in range("]


@pytest.fixture(scope="module", params=[True, False], ids=["async", "plain"])
def llm(request):
    with LLM("vjax-tiny", max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64, async_scheduling=request.param,
             kv_cache_memory_bytes=16 << 20) as engine:  # fmt: skip
        yield engine


@pytest.fixture
def expected(llm):
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


def _ids(outputs) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in outputs]


def _is_idle(llm) -> bool:
    engine = llm.llm_engine
    engine._core.scheduler.check_integrity()
    return not engine.has_unfinished_requests() and engine.get_num_unfinished_requests() == 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ({"prompt_token_ids": []}, "empty"),
        ({"prompt_token_ids": [1, 2, 10**6]}, "1000000"),
        ({"prompt_token_ids": [5] * 256}, "256"),
        ({"prompt_token_ids": [5] * 300}, "300"),
    ],
)
def test_a_bad_prompt_leaves_nothing_behind(llm, expected, prompt, message):
    with pytest.raises(VjaxValidationError, match=message):
        llm.generate([*PROMPTS, prompt, "x"], PARAMS, use_tqdm=False)
    assert _is_idle(llm)
    assert _ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sampling_params": [PARAMS] * 3}, "3 entries for 4 prompts"),
        ({"sampling_params": PARAMS, "priority": [0]}, "1 entries for 4 prompts"),
    ],
)
def test_lists_of_another_length(llm, kwargs, message):
    with pytest.raises(VjaxValidationError, match=message):
        llm.generate(PROMPTS, use_tqdm=False, **kwargs)
    assert _is_idle(llm)


def test_duplicate_request_id(llm):
    llm.llm_engine.add_request("same", "def f():", PARAMS)
    with pytest.raises(VjaxValidationError, match="'same' is in use"):
        llm.llm_engine.add_request("same", "def g():", PARAMS)
    llm.llm_engine.abort_request("same")
    assert _is_idle(llm)


def test_a_failing_dispatch_fails_its_own_requests(llm, expected, monkeypatch):
    runner = llm.llm_engine._core.runner
    execute, calls = runner.execute, []

    def failing(scheduled):
        calls.append(scheduled)
        if len(calls) == 6:
            raise EngineStepError("planted failure")
        return execute(scheduled)

    monkeypatch.setattr(runner, "execute", failing)
    # Four rows: the last two prompts wait, so they are not part of the failing step.
    outputs = llm.generate(PROMPTS + PROMPTS[:2], PARAMS, use_tqdm=False)
    reasons = [o.outputs[0].finish_reason for o in outputs]
    assert reasons == ["error"] * 4 + ["length"] * 2
    assert _ids(outputs[4:]) == expected[:2]
    monkeypatch.undo()
    assert _is_idle(llm)
    assert _ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected


def test_a_failing_device_fails_its_own_requests(llm, expected, monkeypatch):
    from vjax.runner.runner import StepHandle

    result, calls = StepHandle.result, []

    def failing(handle):
        calls.append(handle)
        if len(calls) == 3:
            raise EngineStepError("planted failure")
        return result(handle)

    monkeypatch.setattr(StepHandle, "result", failing)
    outputs = llm.generate(PROMPTS + PROMPTS[:2], PARAMS, use_tqdm=False)
    assert [o.outputs[0].finish_reason for o in outputs] == ["error"] * 4 + ["length"] * 2
    monkeypatch.undo()
    assert _ids(outputs[4:]) == expected[:2]
    assert _ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected


def test_an_error_before_dispatch_changes_nothing(llm, expected, monkeypatch):
    runner = llm.llm_engine._core.runner
    execute, calls = runner.execute, []

    def failing(scheduled):
        calls.append(scheduled)
        if len(calls) == 4:
            raise MemoryError("planted")
        return execute(scheduled)

    engine = llm.llm_engine
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(f"r{i}", prompt, PARAMS)
    monkeypatch.setattr(runner, "execute", failing)
    finished, errors = {}, 0
    while engine.has_unfinished_requests():
        try:
            outputs = engine.step()
        except MemoryError:
            errors += 1
            continue
        finished |= {o.request_id: o for o in outputs if o.finished}
    assert errors == 1
    assert _ids([finished[f"r{i}"] for i in range(4)]) == expected


def test_ctrl_c_leaves_the_engine_usable(llm, expected, monkeypatch):
    runner = llm.llm_engine._core.runner
    execute, calls = runner.execute, []

    def interrupted(scheduled):
        calls.append(scheduled)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return execute(scheduled)

    monkeypatch.setattr(runner, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    monkeypatch.undo()
    assert len(calls) == 4
    assert _is_idle(llm)
    assert _ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected
