"""Scheduling a step before the tokens of the one before it have arrived."""

from __future__ import annotations

from tests.scheduler.simulation import Engine, configs, make_request
from vjax.messages import LAST_SAMPLED, SchedulerOutput, StepOutput
from vjax.request import RequestStatus
from vjax.scheduler.factory import make_scheduler
from vjax.scheduler.scheduler import Scheduler


def prompt(n: int, first: int = 1) -> list[int]:
    return [first] * n


def answer(scheduler: Scheduler, s: SchedulerOutput, *token_ids: int) -> list[tuple[str, list[int], str | None]]:
    outputs = scheduler.update(s, StepOutput(s.step_id, list(token_ids)))
    scheduler.check_integrity()
    return [(o.request_id, o.new_token_ids, o.finish_reason) for o in outputs]


def test_decode_reads_what_the_device_sampled() -> None:
    scheduler = make_scheduler(*configs())
    scheduler.add(make_request("a", prompt(3)))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert (first.token_ids, second.token_ids) == ([1, 1, 1], [LAST_SAMPLED])
    assert answer(scheduler, first, 5) == [("a", [5], None)]
    assert answer(scheduler, second, 6) == [("a", [6], None)]
    # Nothing is in flight, so the host knows the token.
    assert scheduler.schedule().token_ids == [6]


def test_no_step_past_a_certain_end() -> None:
    scheduler = make_scheduler(*configs(max_model_len=8))
    scheduler.add(make_request("a", prompt(3), max_tokens=2))
    scheduler.add(make_request("b", prompt(6, 2), max_tokens=50))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert second.num_decodes == 2
    assert scheduler.schedule().rows == []
    assert len(answer(scheduler, first, 5, 5)) == 2
    assert scheduler.schedule().rows == []
    assert answer(scheduler, second, 6, 6) == [("a", [6], "length"), ("b", [6], "length")]


def test_token_after_an_unforeseen_stop_is_dropped() -> None:
    scheduler = make_scheduler(*configs())
    scheduler.add(make_request("a", prompt(3), eos=7))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert answer(scheduler, first, 7) == [("a", [7], "stop")]
    assert scheduler.stats().kv_cache_usage == 0
    assert answer(scheduler, second, 5) == []
    assert scheduler.stats().generation_tokens == 1


def test_id_used_again_does_not_get_the_old_tokens() -> None:
    scheduler = make_scheduler(*configs())
    scheduler.add(make_request("a", prompt(3)))
    old = scheduler.schedule()
    assert scheduler.abort(["a"]) == ["a"]
    scheduler.add(make_request("a", prompt(5, 2)))
    new = scheduler.schedule()
    assert answer(scheduler, old, 5) == []
    assert answer(scheduler, new, 6) == [("a", [6], None)]


def test_preempted_request_waits_for_its_tokens_and_keeps_them() -> None:
    e = Engine(*configs(num_blocks=5, block_size=4, caching=False), depth=2)
    e.add(make_request("a", prompt(7, 1), max_tokens=8))
    e.add(make_request("b", prompt(7, 2), max_tokens=8))
    while e.scheduler.stats().num_preemptions == 0:
        s = e.scheduler.schedule()
        if s.rows:
            e.dispatch(s)
        if e.scheduler.stats().num_preemptions == 0 and len(e.in_flight) > 1:
            e.receive()
    (b,) = e.scheduler._state.waiting
    assert b.status is RequestStatus.PREEMPTED and b.num_placeholders == 1
    # All of a's blocks are free now, but b's end is not known yet.
    e.scheduler.abort(["a"])
    assert e.scheduler.schedule().rows == []
    num_tokens = b.num_tokens
    while e.in_flight:
        e.receive()
    assert (b.num_tokens, b.num_placeholders) == (num_tokens + 1, 0)
    s = e.scheduler.schedule()
    assert s.token_ids == b.token_ids
    e.dispatch(s)
    e.run()
    assert len(e.outputs["b"]) == 8


def test_preempted_request_can_end_while_it_waits() -> None:
    scheduler = make_scheduler(*configs(num_blocks=5, block_size=4))
    scheduler.add(make_request("a", prompt(8, 1), max_tokens=8))
    scheduler.add(make_request("b", prompt(8, 2), max_tokens=8, eos=7))
    first = scheduler.schedule()
    second = scheduler.schedule()  # a needs a third block: b is preempted
    assert (first.num_sampled, second.num_sampled, scheduler.num_waiting) == (2, 1, 1)
    assert answer(scheduler, first, 5, 7) == [("a", [5], None), ("b", [7], "stop")]
    assert scheduler.num_waiting == 0
    assert answer(scheduler, second, 6) == [("a", [6], None)]


def test_decode_block_is_cached_when_its_last_token_is_known() -> None:
    scheduler = make_scheduler(*configs(block_size=4))
    scheduler.add(make_request("a", prompt(3), max_tokens=20))
    (request,) = scheduler._state.waiting
    first = scheduler.schedule()
    second = scheduler.schedule()  # computes position 3, which fills the block
    assert request.num_hashed_blocks == 0
    answer(scheduler, first, 5)
    assert request.num_hashed_blocks == 1
    answer(scheduler, second, 6)
    assert request.num_hashed_blocks == 1
