"""The rules of V1's scheduler, one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.scheduler.simulation import Engine, configs, make_request
from vjax.errors import VjaxValidationError
from vjax.messages import EngineOutput, StepOutput
from vjax.sampling_params import RepetitionDetectionParams
from vjax.scheduler.factory import make_scheduler
from vjax.scheduler.scheduler import Scheduler


def engine(depth: int = 1, **kwargs) -> Engine:
    return Engine(*configs(**kwargs), depth=depth)


def prompt(n: int, first: int = 1) -> list[int]:
    """A prompt that shares no block with one of another `first`."""
    return [first] * n


def work(e: Engine) -> dict[str, int]:
    """One step; tokens by request id, in the order of the batch."""
    s = e.scheduler.schedule()
    e.check(s)
    if not s.rows:
        return {}
    counts = {r.request_id: n for r, n in zip(e.requests_of(s), s.num_scheduled_tokens, strict=True)}
    e.dispatch(s)
    if len(e.in_flight) >= e.depth:
        e.receive()
    e.scheduler.check_integrity()
    return counts


def give(scheduler: Scheduler, *token_ids: int) -> list[EngineOutput]:
    """One plain step whose samples are given."""
    s = scheduler.schedule()
    return scheduler.update(s, StepOutput(s.step_id, list(token_ids)))


class TestBudget:
    def test_running_first_then_waiting(self) -> None:
        e = engine(budget=10)
        e.add(make_request("a", prompt(4, 1)))
        assert work(e) == {"a": 4}
        e.add(make_request("b", prompt(12, 2)))
        e.add(make_request("c", prompt(3, 3)))
        assert work(e) == {"a": 1, "b": 9}
        assert work(e) == {"a": 1, "b": 3, "c": 3}
        assert work(e) == {"a": 1, "b": 1, "c": 1}

    def test_groups(self) -> None:
        e = engine(budget=12)
        e.add(make_request("partial", prompt(5, 1), max_tokens=20))
        work(e)
        e.add(make_request("chunked", prompt(12, 2)))
        assert work(e) == {"partial": 1, "chunked": 11}
        # A last chunk of one token is a decode; a first chunk of one token is a partial prefill.
        e.add(make_request("whole", prompt(9, 3)))
        e.add(make_request("rest", prompt(9, 4)))
        s = e.scheduler.schedule()
        assert [r.request_id for r in e.requests_of(s)] == ["partial", "chunked", "whole", "rest"]
        assert (s.num_scheduled_tokens, s.num_decodes, s.num_sampled) == ([1, 1, 9, 1], 2, 3)
        assert s.token_ids[1:] == [2] + [3] * 9 + [4]

    def test_long_prefill_threshold_only_when_shared(self) -> None:
        e = engine(budget=32, long_prefill_token_threshold=5)
        e.add(make_request("a", prompt(20, 1)))
        e.add(make_request("b", prompt(8, 2)))
        assert work(e) == {"a": 5, "b": 5}
        assert work(e) == {"a": 5, "b": 3}
        e.scheduler.abort(["b"])
        assert work(e) == {"a": 10}

    def test_without_chunks_prompts_are_whole(self) -> None:
        e = engine(budget=64, enable_chunked_prefill=False, max_model_len=64)
        e.add(make_request("a", prompt(40, 1)))
        e.add(make_request("b", prompt(30, 2)))
        e.add(make_request("c", prompt(3, 3)))
        # c would fit, but nobody is overtaken.
        assert work(e) == {"a": 40}
        assert work(e) == {"a": 1, "b": 30, "c": 3}

    def test_rows_limit(self) -> None:
        e = engine(max_num_seqs=2)
        for i in range(3):
            e.add(make_request(str(i), prompt(3, i + 1), max_tokens=2))
        assert work(e) == {"0": 3, "1": 3}
        assert (e.scheduler.num_running, e.scheduler.num_waiting) == (2, 1)
        assert work(e) == {"0": 1, "1": 1}
        assert work(e) == {"2": 3}


class TestPreemption:
    def test_last_admitted_loses_and_goes_to_the_front(self) -> None:
        e = engine(num_blocks=7, block_size=4)  # 6 usable
        e.add(make_request("a", prompt(8, 1), max_tokens=12))
        e.add(make_request("b", prompt(8, 2), max_tokens=12))
        assert work(e) == {"a": 8, "b": 8}
        e.add(make_request("c", prompt(12, 3), max_tokens=2))
        for _ in range(4):
            assert work(e) == {"a": 1, "b": 1}
        assert work(e) == {"a": 1}
        state = e.scheduler._state
        assert [r.request_id for r in state.waiting] == ["b", "c"]
        b = state.waiting.peek()
        assert (b.num_computed_tokens, b.num_output_tokens, b.num_preemptions, b.row) == (0, 5, 1, 0)
        assert e.scheduler.stats().num_preemptions == 1
        e.run()
        assert len(e.outputs["b"]) == 12

    def test_nothing_is_admitted_in_a_step_that_preempts(self) -> None:
        e = engine(num_blocks=7, block_size=4, policy="priority", caching=False)
        e.add(make_request("a", prompt(8, 1), priority=1))
        e.add(make_request("b", prompt(11, 2), priority=2))
        assert work(e) == {"a": 8, "b": 11}
        e.add(make_request("urgent", prompt(8, 3), priority=0))
        assert work(e) == {"a": 1, "b": 1}
        # b needs a block and is the least urgent itself. Its three blocks would do for the urgent one at once.
        assert work(e) == {"a": 1}
        assert work(e) == {"a": 1, "urgent": 8}

    def test_priority_victim_gives_its_budget_back(self) -> None:
        e = engine(num_blocks=9, policy="priority", budget=4, long_prefill_token_threshold=2, caching=False)
        e.add(make_request("late", prompt(3, 1), priority=5, max_tokens=20))
        assert work(e) == {"late": 3}
        e.add(make_request("first", prompt(17, 2), priority=0, max_tokens=2))
        e.add(make_request("second", prompt(12, 3), priority=1, max_tokens=20))
        counts = []
        while not e.scheduler.stats().num_preemptions:
            counts.append(work(e))
        # "late" had its token already when "first" needed its block; that token of the budget goes to "second".
        assert counts[-2:] == [{"late": 1, "first": 2, "second": 1}, {"first": 2, "second": 2}]
        e.run()

    def test_priority_victim_is_the_least_urgent_then_the_latest(self) -> None:
        e = engine(num_blocks=7, block_size=4, policy="priority")
        for name, priority, arrival in (("a", 1, 3.0), ("b", 1, 7.0), ("c", 0, 9.0)):
            e.add(make_request(name, prompt(7, ord(name)), priority=priority, arrival_time=arrival, max_tokens=9))
        # The most urgent first, then the earliest.
        assert list(work(e)) == ["c", "a", "b"]
        work(e)
        assert list(work(e)) == ["c", "a"]
        e.run()

    def test_priority_orders_the_queue(self) -> None:
        e = engine(max_num_seqs=1, policy="priority")
        for name, priority, arrival in (("a", 2, 0.0), ("b", 1, 5.0), ("c", 1, 4.0), ("d", 1, 4.0)):
            e.add(make_request(name, prompt(3), priority=priority, arrival_time=arrival, max_tokens=1))
        assert [list(work(e)) for _ in range(4)] == [["c"], ["d"], ["b"], ["a"]]

    def test_readmission_sends_row_and_all_blocks(self) -> None:
        e = engine(num_blocks=7, block_size=4, caching=False)
        e.add(make_request("a", prompt(8, 1), max_tokens=12))
        e.add(make_request("b", prompt(8, 2), max_tokens=12))
        while e.scheduler.stats().num_preemptions == 0:
            work(e)
        e.scheduler.abort(["a"])
        s = e.scheduler.schedule()
        (init,) = s.new_rows
        assert (init.row, init.num_computed_tokens, init.num_prompt_tokens) == (s.rows[0], 0, 8)
        assert s.block_columns == [0, 1, 2, 3] and s.block_rows == [init.row] * 4
        assert s.token_ids == e.histories[tuple(prompt(8, 2)), None].token_ids[:13]


class TestAdmission:
    def test_the_whole_prompt_must_fit(self) -> None:
        e = engine(num_blocks=7, block_size=4, budget=8)
        e.add(make_request("a", prompt(8, 1), max_tokens=5))
        work(e)
        e.add(make_request("b", prompt(20, 2), max_tokens=4))
        e.add(make_request("c", prompt(2, 3), max_tokens=1))
        # b's first chunk fits into the 3 blocks left, its prompt does not; c may not overtake it.
        for _ in range(4):
            assert work(e) == {"a": 1}
        assert list(work(e)) == ["b"]

    def test_blocks_are_sent_once(self) -> None:
        e = engine(block_size=4)
        e.add(make_request("a", prompt(6, 1), max_tokens=9))
        s = e.scheduler.schedule()
        assert (s.block_rows, s.block_columns) == ([s.rows[0]] * 2, [0, 1])
        assert len(s.new_rows) == 1
        e.dispatch(s)
        e.receive()
        deltas = []
        for _ in range(7):
            s = e.step()
            assert not s.new_rows
            deltas.append(s.block_columns)
        assert deltas == [[], [], [2], [], [], [], [3]]

    def test_row_init_masks_stop_tokens_until_min_tokens(self) -> None:
        scheduler = make_scheduler(*configs())
        scheduler.add(make_request("a", prompt(3), min_tokens=2, eos=7, stop_token_ids=[9, 5]))
        scheduler.add(make_request("b", prompt(3), eos=7, stop_token_ids=[9, 5]))
        ignoring = make_request("c", prompt(3), min_tokens=2, ignore_eos=True, stop_token_ids=[9])
        scheduler.add(replace(ignoring, ignored_eos_token_ids=(7, 6)))
        a, b, c = scheduler.schedule().new_rows
        assert (a.masked_token_ids, b.masked_token_ids, c.masked_token_ids) == ((5, 7, 9), (), (6, 7, 9))

    @pytest.mark.parametrize(
        ("request_args", "match"),
        [
            ((prompt(64), 1), "length 64.*maximum model length of 64"),
            (([], 1), "cannot be empty"),
            ((prompt(20), 30), "max_tokens=30 need 13 KV blocks of 4 tokens, and the cache has 10"),
        ],
    )
    def test_refusals(self, request_args: tuple[list[int], int], match: str) -> None:
        scheduler = make_scheduler(*configs(num_blocks=11))
        with pytest.raises(VjaxValidationError, match=match):
            scheduler.add(make_request("a", request_args[0], max_tokens=request_args[1]))
        assert not scheduler.has_unfinished_requests
        scheduler.check_integrity()

    def test_the_largest_request_that_fits_runs(self) -> None:
        e = engine(num_blocks=11, block_size=4)
        e.add(make_request("a", prompt(20), max_tokens=21))
        e.run()
        assert len(e.outputs["a"]) == 21

    def test_id_in_use(self) -> None:
        scheduler = make_scheduler(*configs())
        scheduler.add(make_request("a", prompt(3)))
        with pytest.raises(VjaxValidationError, match="'a' belongs to a request that is not finished"):
            scheduler.add(make_request("a", prompt(3)))
        assert scheduler.abort(["a", "a", "b"]) == ["a"]
        scheduler.add(make_request("a", prompt(3)))


class TestBlocked:
    def test_waits_outside_of_the_queue(self) -> None:
        e = engine()
        e.add(make_request("a", prompt(4)), blocked=True)
        scheduler = e.scheduler
        assert scheduler.has_unfinished_requests and not scheduler.has_runnable_requests
        assert work(e) == {} and scheduler.num_waiting == 1
        e.add(make_request("b", prompt(4), max_tokens=3))
        with pytest.raises(VjaxValidationError, match="'a' belongs to a request that is not finished"):
            e.add(make_request("a", prompt(4)))
        assert scheduler.has_runnable_requests and work(e) == {"b": 4}
        e.unblock()
        assert work(e) == {"b": 1, "a": 4} and scheduler.num_waiting == 0
        e.run()
        assert e.finished.keys() == {"a", "b"}

    def test_ends(self) -> None:
        """One is aborted and another one of its id comes, one fails."""
        e = engine()
        for request_id in "ab":
            e.add(make_request(request_id, prompt(4)), blocked=True)
        assert e.scheduler.abort(["a"]) == ["a"]
        e.scheduler.check_integrity()
        e.add(make_request("a", prompt(3)))
        assert e.scheduler.fail(e.blocked.pop(), "no grammar") == EngineOutput("b", [], "error", error="no grammar")
        assert work(e) == {"a": 3}
        e.run()
        assert len(e.outputs["a"]) == 8


class TestPrefixCache:
    def test_identical_prompts_of_one_step_share(self) -> None:
        e = engine(block_size=4)
        e.add(make_request("a", prompt(9)))
        e.add(make_request("b", prompt(9)))
        e.add(make_request("salted", prompt(9), salt="s"))
        assert work(e) == {"a": 9, "b": 1, "salted": 9}
        a, b, salted = e.scheduler._state.running
        assert a.block_ids[:2] == b.block_ids[:2] and not set(a.block_ids) & set(salted.block_ids)
        assert (a.num_cached_tokens, b.num_cached_tokens, salted.num_cached_tokens) == (0, 8, 0)
        stats = e.scheduler.stats()
        assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (27, 8)
        e.run()

    def test_not_read_but_written(self) -> None:
        e = engine(block_size=4, budget=6)
        e.add(make_request("a", prompt(9), max_tokens=1))
        e.run()
        e.add(make_request("b", prompt(9), max_tokens=1, skip_reading_prefix_cache=True))
        assert [work(e), work(e)] == [{"b": 6}, {"b": 3}]
        assert e.finished["b"].num_cached_tokens == 0
        stats = e.scheduler.stats()
        assert (stats.prefix_cache_requests, stats.prefix_cache_queries, stats.prefix_cache_hits) == (1, 9, 0)
        e.add(make_request("first", prompt(13, 2), max_tokens=1, skip_reading_prefix_cache=True))
        e.run()
        e.add(make_request("second", prompt(13, 2), max_tokens=1))
        e.run()
        assert (e.finished["first"].num_cached_tokens, e.finished["second"].num_cached_tokens) == (0, 12)

    def test_not_read_after_preemption_either(self) -> None:
        e = engine(num_blocks=7, block_size=4)
        e.add(make_request("a", prompt(8, 1), max_tokens=12))
        e.add(make_request("b", prompt(8, 2), max_tokens=12, skip_reading_prefix_cache=True))
        admitted = []
        while e.scheduler.has_unfinished_requests:
            s = e.step()
            admitted += [(init.num_prompt_tokens, init.num_computed_tokens) for init in s.new_rows]
        assert e.scheduler.stats().num_preemptions > 0 and len(admitted) > 2
        assert all(num_computed == 0 for _, num_computed in admitted)
        stats = e.scheduler.stats()
        assert (stats.prefix_cache_requests, stats.prefix_cache_queries) == (1, 8)

    def test_an_unscheduled_one_is_not_counted(self) -> None:
        scheduler = make_scheduler(*configs())
        scheduler.add(make_request("a", prompt(9), skip_reading_prefix_cache=True))
        scheduler.unschedule(scheduler.schedule())
        assert scheduler.stats().prefix_cache_requests == scheduler.stats().prefix_cache_queries == 0

    def test_outputs_are_cached(self) -> None:
        e = engine(block_size=4)
        e.add(make_request("a", prompt(3), max_tokens=10))
        e.run()
        tokens = prompt(3) + e.outputs["a"]
        e.add(make_request("b", tokens, max_tokens=1))
        e.run()
        assert e.finished["b"].num_cached_tokens == 12

    def test_counted_at_first_admission_only(self) -> None:
        e = engine(num_blocks=7, block_size=4)
        e.add(make_request("a", prompt(8, 1), max_tokens=12))
        e.add(make_request("b", prompt(8, 2), max_tokens=12))
        e.run()
        stats = e.scheduler.stats()
        assert stats.num_preemptions > 0
        assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (16, 0)
        assert e.finished["b"].num_cached_tokens == 0
        assert (stats.prompt_tokens, stats.generation_tokens) == (16, 24)

    def test_reset(self) -> None:
        e = engine(block_size=4)
        e.add(make_request("a", prompt(9), max_tokens=3))
        work(e)
        assert not e.scheduler.reset_prefix_cache()
        e.run()
        assert e.scheduler.reset_prefix_cache()
        e.add(make_request("b", prompt(9), max_tokens=3))
        e.run()
        assert e.finished["b"].num_cached_tokens == 0


class TestFinish:
    def run(self, tokens: list[int], *, max_model_len: int = 64, length: int = 3, **kwargs) -> tuple[int, str, object]:
        scheduler = make_scheduler(*configs(max_model_len=max_model_len))
        scheduler.add(make_request("a", prompt(length), **kwargs))
        for count, token_id in enumerate(tokens, 1):
            (output,) = give(scheduler, token_id)
            assert output.new_token_ids == [token_id]
            if output.finish_reason:
                assert not scheduler.has_unfinished_requests
                scheduler.check_integrity()
                return count, output.finish_reason, output.stop_reason
        raise AssertionError("did not finish")

    def test_eos(self) -> None:
        assert self.run([5, 7, 5], eos=7) == (2, "stop", None)

    def test_stop_token(self) -> None:
        assert self.run([5, 9, 5], eos=7, stop_token_ids=[8, 9]) == (2, "stop", 9)

    def test_eos_comes_before_stop_token(self) -> None:
        assert self.run([7], eos=7, stop_token_ids=[7]) == (1, "stop", None)

    def test_length(self) -> None:
        assert self.run([7, 7, 7], max_tokens=3) == (3, "length", None)

    def test_eos_on_the_last_token_is_stop(self) -> None:
        assert self.run([5, 5, 7], max_tokens=3, eos=7) == (3, "stop", None)

    def test_repetition(self) -> None:
        def run(tokens: list[int], *sizes: int, **kwargs) -> tuple[int, str, object]:
            return self.run(tokens, repetition_detection=RepetitionDetectionParams(*sizes), max_tokens=40, **kwargs)

        found = ("repetition", "repetition_detected")
        assert run([5, 5, 5, 5], 1, 0, 3) == (3, *found)  # the prompt's tokens do not count
        assert run([1, 1, 1], 1, 0, 3, length=20) == (3, *found)
        assert run([4, 1, 2, 1, 2, 1, 2], 2, 1, 3) == (7, *found)
        assert run([1, 2, 3, 1, 2, 3, 3], 3, 3, 2) == (6, *found)
        assert run([1, 1, 1, 1, 1], 3, 2, 2) == (4, *found)  # a pattern may be one token over and over
        # Neither too short nor too long a pattern, nor one that is interrupted.
        assert run([1, 1, 2, 2, 1, 1, 9], 3, 2, 2, eos=9) == (7, "stop", None)
        assert run([1, 2, 3, 4, 1, 2, 3, 4, 9], 3, 1, 2, eos=9) == (9, "stop", None)
        assert run([1, 2, 3, 1, 2, 1, 2, 3, 9], 3, 3, 2, eos=9) == (9, "stop", None)

    def test_repetition_comes_last(self) -> None:
        detection = RepetitionDetectionParams(2, 1, 2)
        assert self.run([7, 7], eos=7, repetition_detection=detection, min_tokens=2) == (1, "stop", None)
        assert self.run([9, 9], repetition_detection=detection, stop_token_ids=[9]) == (1, "stop", 9)
        assert self.run([5, 5], repetition_detection=detection, max_tokens=2) == (2, "length", None)
        # Not before min_tokens.
        late = self.run([5, 5, 5, 5, 5], repetition_detection=detection, min_tokens=4)
        assert late == (4, "repetition", "repetition_detected")
        off = RepetitionDetectionParams()
        assert self.run([5] * 9, repetition_detection=off) == (8, "length", None)

    def test_model_length(self) -> None:
        assert self.run([5] * 9, max_model_len=8, max_tokens=60) == (5, "length", None)
        assert self.run([5], max_model_len=8, length=7, max_tokens=60) == (1, "length", None)


def test_nothing_to_do() -> None:
    scheduler = make_scheduler(*configs())
    assert scheduler.schedule().rows == []
    assert not scheduler.has_unfinished_requests
    assert scheduler.abort(["x"]) == []


def test_stats() -> None:
    e = engine(num_blocks=11, block_size=4, max_num_seqs=1)
    e.add(make_request("a", prompt(8)))
    e.add(make_request("b", prompt(8)))
    work(e)
    stats = e.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (1, 1, 0.2)
