"""Steps that are never dispatched, that the device fails, or whose tokens are not wanted any more."""

from __future__ import annotations

import pytest

from tests.scheduler.simulation import Engine, configs, make_request


def prompt(n: int, first: int = 1) -> list[int]:
    return [first] * n


def engine(depth: int = 1, **kwargs) -> Engine:
    return Engine(*configs(**kwargs), depth=depth)


class TestUnschedule:
    def test_everything_is_taken_back(self) -> None:
        e = engine(block_size=4, budget=10)
        e.add(make_request("a", prompt(16, 1)))
        e.step()
        e.add(make_request("b", prompt(3, 2)))
        (a,) = e.scheduler._state.running
        before = (a.num_computed_tokens, list(a.block_ids), a.num_hashed_blocks, a.num_placeholders)
        stats = e.scheduler.stats()
        e.fail_dispatch()
        e.scheduler.check_integrity()
        assert (a.num_computed_tokens, a.block_ids, a.num_hashed_blocks, a.num_placeholders) == before
        assert e.scheduler.stats() == stats and e.scheduler.num_waiting == 1
        e.run()
        assert set(e.finished) == {"a", "b"}

    def test_hashes_of_the_step_are_gone(self) -> None:
        e = engine(block_size=4)
        e.add(make_request("a", prompt(9)))
        e.add(make_request("b", prompt(9)))
        e.fail_dispatch()
        e.scheduler.check_integrity()
        assert e.scheduler.stats().prefix_cache_hits == 0
        e.scheduler.abort(["b"])
        e.run()
        assert e.finished["a"].num_cached_tokens == 0

    def test_older_hashes_stay(self) -> None:
        e = engine(block_size=4)
        e.add(make_request("a", prompt(9)))
        e.run()
        e.add(make_request("b", prompt(9)))
        e.fail_dispatch()
        e.run()
        assert e.finished["b"].num_cached_tokens == 8

    def test_order_of_the_queue_is_kept(self) -> None:
        e = engine(max_num_seqs=2)
        for name in "abc":
            e.add(make_request(name, prompt(3, ord(name))))
        e.fail_dispatch()
        assert [r.request_id for r in e.scheduler._state.waiting] == ["a", "b", "c"]
        assert e.scheduler.stats().num_preemptions == 0

    def test_only_the_latest_step(self) -> None:
        e = engine(depth=2)
        e.add(make_request("a", prompt(3)))
        first = e.scheduler.schedule()
        e.scheduler.schedule()
        with pytest.raises(AssertionError):
            e.scheduler.unschedule(first)

    def test_behind_a_step_in_flight(self) -> None:
        e = engine(depth=2)
        e.add(make_request("a", prompt(3)))
        e.dispatch(e.scheduler.schedule())
        for _ in range(3):
            e.fail_dispatch()
            e.scheduler.check_integrity()
        e.run()
        assert len(e.outputs["a"]) == 8


class TestFailStep:
    def test_only_its_own_requests_are_lost(self) -> None:
        e = engine(budget=8, block_size=4)
        e.add(make_request("a", prompt(8, 1)))
        e.add(make_request("b", prompt(8, 2)))
        e.add(make_request("c", prompt(8, 3)))
        e.step()
        e.dispatch(e.scheduler.schedule())  # a's decode and most of b
        e.fail_device(0, receive_first=False)
        e.scheduler.check_integrity()
        assert {k: o.finish_reason for k, o in e.finished.items()} == {"a": "error", "b": "error"}
        assert e.finished["a"].error == "device fault"
        e.run()
        assert e.finished["c"].finish_reason == "length"

    @pytest.mark.parametrize("receive_first", [False, True])
    def test_steps_before_it_count(self, receive_first: bool) -> None:
        """The first of three steps in flight is good; a's token in it survives, whenever it is read."""
        e = engine(depth=4, budget=8, block_size=4)
        e.add(make_request("a", prompt(8, 1), max_tokens=1))
        e.add(make_request("b", prompt(8, 2)))
        e.add(make_request("c", prompt(8, 3)))
        for _ in range(3):
            e.dispatch(e.scheduler.schedule())
        e.fail_device(1, receive_first)
        e.scheduler.check_integrity()
        assert e.finished["b"].finish_reason == "error" and "c" not in e.finished
        e.run()
        assert e.finished["a"].finish_reason == "length"
        assert e.finished["c"].finish_reason == "length"

    def test_prefix_cache_is_cleared(self) -> None:
        e = engine(block_size=4)
        e.add(make_request("a", prompt(9)))
        e.run()
        e.add(make_request("b", prompt(3, 2)))
        e.dispatch(e.scheduler.schedule())
        e.fail_device(0, receive_first=False)
        e.add(make_request("c", prompt(9)))
        e.run()
        assert e.finished["c"].num_cached_tokens == 0

    def test_steps_behind_it_must_be_given(self) -> None:
        e = engine(depth=2)
        e.add(make_request("a", prompt(3)))
        first = e.scheduler.schedule()
        e.scheduler.schedule()
        with pytest.raises(AssertionError):
            e.scheduler.fail_step([first], "device fault")


class TestResetRunning:
    def test_tokens_in_flight_are_dropped_and_drawn_again(self) -> None:
        e = engine(depth=3, block_size=4)
        e.add(make_request("a", prompt(5, 1)))
        e.add(make_request("b", prompt(5, 2)))
        for _ in range(2):
            e.dispatch(e.scheduler.schedule())
        assert e.scheduler.reset_prefix_cache(reset_running_requests=True)
        e.scheduler.check_integrity()
        assert [r.request_id for r in e.scheduler._state.waiting] == ["a", "b"]
        assert e.receive() == [] and e.receive() == []
        e.run()
        assert len(e.outputs["a"]) == len(e.outputs["b"]) == 8
