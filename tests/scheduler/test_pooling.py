"""The scheduler of a model that pools: each state arrives once, whatever becomes of the request meanwhile."""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import pytest

from tests.scheduler.simulation import configs
from vjax.errors import VjaxValidationError
from vjax.messages import POOLING_TYPES, EngineOutput, EngineRequest, SchedulerOutput, StepOutput
from vjax.sampling_params import SamplingParams
from vjax.scheduler.factory import make_scheduler
from vjax.scheduler.limits import check_request


def make_request(request_id: str, prompt: list[int], pooling_type: str, salt: str | None = None) -> EngineRequest:
    params = SamplingParams(max_tokens=1, skip_reading_prefix_cache=pooling_type != "LAST")
    return EngineRequest(request_id, prompt, params, None, 0.0, cache_salt=salt, pooling_type=pooling_type)


def run(s: SchedulerOutput) -> StepOutput:
    """A model for which the state of a token is its id."""
    assert s.pooled is not None
    ids = np.array(s.token_ids, np.float32)
    vectors = ids[s.pooled.indices, None]
    sums = [[ids[start:end].sum()] for start, end in zip(s.pooled.starts, s.pooled.ends, strict=True)]
    return StepOutput(s.step_id, [], vectors=vectors, sums=np.array(sums, np.float32).reshape(-1, 1))


def expected(request: EngineRequest) -> list[float] | list[list[float]]:
    ids = request.prompt_token_ids
    if request.pooling_type == "ALL":
        return [[i] for i in ids]
    return [{"LAST": ids[-1], "CLS": ids[0], "MEAN": sum(ids) / len(ids)}[request.pooling_type or ""]]


def check(output: EngineOutput, request: EngineRequest) -> None:
    assert (output.finish_reason, output.new_token_ids) == ("stop", [])
    np.testing.assert_allclose(output.pooled, expected(request), rtol=1e-6)


def test_a_request_ends_with_its_prompt_and_frees_what_it_held():
    scheduler = make_scheduler(*configs(budget=8, pools=True))
    requests = {kind: make_request(kind, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], kind, salt=kind) for kind in POOLING_TYPES}
    one = make_request("one", [7], "MEAN")
    for request in (*requests.values(), one):
        scheduler.add(request)
    outputs = {}
    for _ in range(6):
        s = scheduler.schedule()
        outputs |= {output.request_id: output for output in scheduler.update(s, run(s))}
        scheduler.check_integrity()
    assert not scheduler.has_unfinished_requests and scheduler.stats().kv_cache_usage == 0
    for request in (*requests.values(), one):
        check(outputs[request.request_id], request)
    stats = scheduler.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (41, 0)


def test_only_the_last_state_can_do_without_cached_tokens():
    scheduler = make_scheduler(*configs(budget=64, pools=True))
    prompt = list(range(1, 14))
    for kind in ("LAST", "LAST", "MEAN", "CLS", "ALL"):
        scheduler.add(make_request("r", prompt, kind))
        s = scheduler.schedule()
        (output,) = scheduler.update(s, run(s))
        check(output, make_request("r", prompt, kind))
        assert (s.num_tokens, output.num_cached_tokens) in ([(13, 0)] if kind != "LAST" else [(13, 0), (1, 12)])


def test_limits():
    for n, kind, parts in [
        (64, "LAST", None),
        (65, "MEAN", "maximum model length of 64"),
        (0, "CLS", "cannot be empty"),
    ]:
        request = make_request("r", [1] * n, kind)
        if parts is None:
            check_request(request, 64, 17, 4)
            with pytest.raises(VjaxValidationError, match="needs 16 KV blocks of 4 tokens, and the cache has 15"):
                check_request(request, 64, 16, 4)
        else:
            with pytest.raises(VjaxValidationError, match=parts):
                check_request(request, 64, 17, 4)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_every_prompt_gets_its_states(seed):
    """Prompts in chunks, few blocks, so that requests are preempted; steps that are taken back, failed or dropped; and
    requests that are aborted."""
    rng = random.Random(seed)
    depth = rng.choice([1, 2])
    chunked = rng.random() < 0.8
    scheduler = make_scheduler(
        *configs(num_blocks=20, budget=rng.choice([9, 16]) if chunked else 64, enable_chunked_prefill=chunked,
                 max_num_seqs=6, pools=True, static_batch=seed == 0)
    )  # fmt: skip
    live: dict[str, EngineRequest] = {}
    in_flight: deque[tuple[SchedulerOutput, StepOutput]] = deque()
    num_done = num_failed = 0

    def take(outputs: list[EngineOutput]) -> None:
        nonlocal num_done, num_failed
        for output in outputs:
            request = live.pop(output.request_id)
            if output.finish_reason == "error":
                num_failed += 1
            else:
                check(output, request)
                num_done += 1

    for number in range(1500):
        if len(live) < 12 and rng.random() < 0.4 and number < 1400:
            prefix = [5, 6, 7, 8] * rng.randint(0, 6)
            prompt = (prefix + [rng.randrange(1, 50) for _ in range(rng.randint(1, 40))])[:64]
            request = make_request(str(number), prompt, rng.choice(POOLING_TYPES))
            scheduler.add(request)
            live[request.request_id] = request
        event = rng.random()
        s = scheduler.schedule()
        if s.rows and event < 0.05:
            scheduler.unschedule(s)
        elif s.rows:
            in_flight.append((s, run(s)))
        if in_flight and event > 0.97:
            take(scheduler.fail_step([step for step, _ in in_flight], "lost"))
            in_flight.clear()
        elif event > 0.94:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        elif event > 0.92 and live:
            request_id = rng.choice(list(live))
            assert scheduler.abort([request_id]) == [request_id]
            del live[request_id]
        if len(in_flight) >= depth or (in_flight and not s.rows):
            take(scheduler.update(*in_flight.popleft()))
        scheduler.check_integrity()
    while live:
        s = scheduler.schedule()
        if s.rows:
            in_flight.append((s, run(s)))
        take(scheduler.update(*in_flight.popleft()))
    assert num_done > 100 and num_failed > 0
    assert scheduler.stats().num_preemptions > 0
