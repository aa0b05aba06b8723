"""The engine's promises on the device: same ids in every mode, no compilation after warm-up, recovery from failures."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from tests.gpu.engines import device_bytes, generated_ids, greedy, make_llm, settled_device_bytes, token_prompts
from vjax import SamplingParams
from vjax.errors import EngineStepError
from vjax.runner import runner as runner_module
from vjax.runner.runner import StepHandle

pytestmark = pytest.mark.gpu

VOCAB_SIZE = 4096
NUM_TOKENS = 48
#: Results of steps that nobody has collected yet.
SLACK = 1 << 20
MODES = {
    "v1": {"use_v1": True},
    "v1-plain": {"use_v1": True, "async_scheduling": False},
    "v1-without-prefix-cache": {"use_v1": True, "enable_prefix_caching": False},
    "v0": {"use_v1": False},
}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Sixteen lengths up to 400; the second half of them share their first 32 tokens."""
    rng = np.random.default_rng(2)
    shared = rng.integers(2, VOCAB_SIZE, 32).tolist()
    lengths = np.unique(np.geomspace(1, 400, 24).astype(int))[-16:]
    found = [rng.integers(2, VOCAB_SIZE, n).tolist() for n in lengths]
    return [(shared + p)[: len(p)] if i >= 8 else p for i, p in enumerate(found)]


# ---- modes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ids_of_mode(prompts):
    """mode -> token ids in float32: greedy, then seeded and truncated, cold and once more with a warm cache."""
    params = [greedy(NUM_TOKENS)] * len(prompts)
    params += [
        SamplingParams(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, seed=i, max_tokens=NUM_TOKENS, ignore_eos=True)
        for i in range(len(prompts))
    ]
    answers = {}
    for mode, options in MODES.items():
        with make_llm(dtype="float32", max_num_seqs=16, max_num_batched_tokens=512, **options) as llm:
            answers[mode] = [generated_ids(llm, prompts * 2, params) for _ in range(2)]
            llm.llm_engine._core.scheduler.check_integrity()
    return answers


@pytest.mark.parametrize("mode", [m for m in MODES if m != "v1-plain"])
@pytest.mark.parametrize("turn", [0, 1], ids=["cold", "warm"])
def test_ids_do_not_depend_on_the_mode(ids_of_mode, mode, turn):
    assert ids_of_mode[mode][turn] == ids_of_mode["v1-plain"][0]


# ---- compilation ----------------------------------------------------------------------------------------------------


def _random_requests(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Every sampling variant, lengths from 1 to 400."""
    rng = np.random.default_rng(0)
    prompts, params = [], []
    for _ in range(count):
        prompts.append(rng.integers(2, VOCAB_SIZE, int(np.clip(rng.lognormal(3.0, 1.3), 1, 400))).tolist())
        kind = rng.integers(4)
        params.append(
            SamplingParams(
                temperature=0.0 if kind == 0 else 0.8,
                top_k=20 if kind >= 2 else 0,
                top_p=0.9 if kind >= 2 else 1.0,
                min_tokens=2 if kind == 3 else 0,
                max_tokens=int(rng.integers(2, 40)),
            )
        )
    return prompts, params


def test_no_compilation_after_warm_up():
    """In the model's own dtype, bfloat16, which is what serves. Blocks are few, so requests are preempted too."""
    compiled: list[str] = []

    def listen(event: str, *_: object, **__: object) -> None:
        if "compile" in event:
            compiled.append(event)

    with make_llm(max_num_seqs=32, max_num_batched_tokens=512, num_gpu_blocks_override=200) as llm:
        llm.llm_engine.warm_up()
        prompts, params = _random_requests(300)
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            outputs = llm.generate(token_prompts(prompts), params, use_tqdm=False)
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        assert [o.outputs[0].finish_reason in ("length", "stop") for o in outputs] == [True] * len(prompts)
        assert compiled == []
        assert llm.llm_engine.num_compilations_while_serving == 0
        llm.llm_engine._core.scheduler.check_integrity()


# ---- failures -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four_rows():
    """Room for four requests at once, so that of six the last two wait."""
    with make_llm(dtype="float32", max_num_seqs=4, max_num_batched_tokens=512) as llm:
        llm.llm_engine.warm_up()
        yield llm


@pytest.fixture
def six_prompts(prompts) -> list[list[int]]:
    return prompts[:6]


@pytest.fixture
def expected(four_rows, six_prompts) -> list[list[int]]:
    return generated_ids(four_rows, six_prompts, greedy(12))


def _plant(monkeypatch, where: str, llm) -> None:
    """Makes one step fail: before dispatch, when the result is read, or because its cache is gone."""
    runner, calls = llm.llm_engine._core.runner, itertools.count()
    owner, name = (StepHandle, "result") if where == "result" else (runner, "execute")
    original = getattr(owner, name)

    def failing(*args):
        if next(calls) == 3:
            if where != "deleted-cache":
                raise EngineStepError("planted failure")
            runner._kv[0][0].delete()
        return original(*args)

    monkeypatch.setattr(owner, name, failing)


@pytest.fixture
def bytes_at_allocation(monkeypatch) -> list[int]:
    """What was in use on the device each time the runner was about to allocate a cache or rows."""
    seen: list[int] = []
    allocate = runner_module.allocate

    def watched(*args):
        seen.append(settled_device_bytes(0, seconds=0.2))
        return allocate(*args)

    monkeypatch.setattr(runner_module, "allocate", watched)
    return seen


@pytest.mark.parametrize("where", ["dispatch", "result", "deleted-cache"])
def test_a_failed_step_fails_its_own_requests(
    four_rows, six_prompts, expected, monkeypatch, bytes_at_allocation, where
):
    before, cache_bytes = device_bytes(), 256 << 20
    _plant(monkeypatch, where, four_rows)
    outputs = [o.outputs[0] for o in four_rows.generate(token_prompts(six_prompts), greedy(12), use_tqdm=False)]
    monkeypatch.undo()
    assert [o.finish_reason for o in outputs] == ["error"] * 4 + ["length"] * 2
    assert [o.token_ids for o in outputs[4:]] == expected[4:]
    assert generated_ids(four_rows, six_prompts, greedy(12)) == expected
    four_rows.llm_engine._core.scheduler.check_integrity()
    # A cache fills the device: the old one has to be gone before there is room for the new one.
    assert bytes_at_allocation[0] <= before - cache_bytes + SLACK
    assert device_bytes() <= before + SLACK
