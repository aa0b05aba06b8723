"""V0: one batch at a time."""

from __future__ import annotations

from tests.scheduler.simulation import Engine, configs, make_request


def prompt(n: int, first: int) -> list[int]:
    return [first] * n


def engine(**kwargs) -> Engine:
    return Engine(*configs(static_batch=True, **kwargs))


def work(e: Engine) -> dict[str, int]:
    s = e.scheduler.schedule()
    e.check(s)
    if not s.rows:
        return {}
    counts = {r.request_id: n for r, n in zip(e.requests_of(s), s.num_scheduled_tokens, strict=True)}
    e.dispatch(s)
    e.receive()
    e.scheduler.check_integrity()
    return counts


def test_next_batch_starts_when_all_are_done() -> None:
    e = engine(max_num_seqs=2, enable_chunked_prefill=False)
    for i, max_tokens in enumerate((2, 4, 3)):
        e.add(make_request(str(i), prompt(5, i + 1), max_tokens=max_tokens))
    assert work(e) == {"0": 5, "1": 5}
    assert work(e) == {"0": 1, "1": 1}
    assert work(e) == {"1": 1}
    assert work(e) == {"1": 1}
    assert work(e) == {"2": 5}


def test_late_arrivals_wait() -> None:
    e = engine(enable_chunked_prefill=False)
    e.add(make_request("a", prompt(5, 1), max_tokens=3))
    work(e)
    e.add(make_request("b", prompt(5, 2), max_tokens=3))
    assert work(e) == {"a": 1}
    assert work(e) == {"a": 1}
    assert work(e) == {"b": 5}


def test_whole_prompts_over_several_steps_before_any_decode() -> None:
    e = engine(budget=64, max_model_len=64, enable_chunked_prefill=False)
    for i, length in enumerate((40, 30, 20, 10)):
        e.add(make_request(str(i), prompt(length, i + 1)))
    assert work(e) == {"0": 40}
    e.add(make_request("late", prompt(1, 9)))
    assert work(e) == {"1": 30, "2": 20, "3": 10}
    assert work(e) == {"0": 1, "1": 1, "2": 1, "3": 1}


def test_chunks_fill_the_budget() -> None:
    e = engine(budget=8)
    e.add(make_request("a", prompt(12, 1)))
    e.add(make_request("b", prompt(9, 2)))
    assert work(e) == {"a": 8}
    assert work(e) == {"a": 4, "b": 4}
    assert work(e) == {"b": 5}
    assert work(e) == {"a": 1, "b": 1}


def test_batch_ends_where_blocks_run_out() -> None:
    e = engine(num_blocks=7, block_size=4, enable_chunked_prefill=False, caching=False)
    for i in range(3):
        e.add(make_request(str(i), prompt(11, i + 1), max_tokens=2))
    assert work(e) == {"0": 11, "1": 11}
    assert work(e) == {"0": 1, "1": 1}
    assert work(e) == {"2": 11}


def test_preempted_request_joins_the_next_batch() -> None:
    e = engine(num_blocks=7, block_size=4, enable_chunked_prefill=False, caching=False)
    e.add(make_request("a", prompt(10, 1), max_tokens=8))
    e.add(make_request("b", prompt(11, 2), max_tokens=8))
    assert work(e) == {"a": 10, "b": 11}
    while e.scheduler.stats().num_preemptions == 0:
        work(e)
    assert e.scheduler.num_waiting == 1
    steps = []
    while "a" not in e.finished:
        steps.append(work(e))
    assert all(list(step) == ["a"] for step in steps)
    assert list(work(e)) == ["b"]
    e.run()
    assert len(e.outputs["b"]) == 8


def test_prefix_hits_within_the_batch() -> None:
    e = engine(block_size=4, enable_chunked_prefill=False)
    e.add(make_request("a", prompt(9, 1)))
    e.add(make_request("b", prompt(9, 1)))
    assert work(e) == {"a": 9, "b": 1}
    assert e.scheduler.stats().prefix_cache_hits == 8
