"""AsyncLLM with the engine core in a thread, on the bundled model: what concurrent callers may do to each other."""

from __future__ import annotations

import asyncio
import random
import threading
import weakref
from types import SimpleNamespace

import pytest

from vjax import (
    LLM,
    AsyncEngineArgs,
    AsyncLLM,
    BeamSearchParams,
    EngineDeadError,
    RequestOutputKind,
    SamplingParams,
    VjaxValidationError,
)
from vjax.config.cache import CacheConfig
from vjax.config.engine_config import EngineConfig, LoadConfig, ModelConfig
from vjax.config.scheduler import SchedulerConfig
from vjax.engine.builder import BuiltEngine
from vjax.engine.collector import OutputCollector, wake
from vjax.engine.core import EngineCore
from vjax.messages import StepOutput
from vjax.metrics import Counter, Gauge
from vjax.outputs import CompletionOutput, RequestOutput
from vjax.scheduler.factory import make_scheduler

pytestmark = pytest.mark.usefixtures("shared_programs")

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
#: As in other tests, so that what they compiled is found.
SMALL = {"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 16 << 20}
PROMPTS = ["def add(a, b):", "import os", "class Node:", "for i in range("]


def params(kind: RequestOutputKind = DELTA, max_tokens: int = 12, **fields) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "output_kind": kind, "max_tokens": max_tokens, **fields})


@pytest.fixture(scope="module")
def engine():
    with AsyncLLM.from_engine_args(AsyncEngineArgs(model="vjax-tiny", **SMALL), multiprocess=False) as engine:
        yield engine


BEAMS = BeamSearchParams(beam_width=3, max_tokens=6)


@pytest.fixture(scope="module")
def offline():
    """What LLM gives: prompt -> completion, and the beams of each prompt."""
    with LLM("vjax-tiny", **SMALL) as llm:
        outputs = llm.generate(PROMPTS, params(FINAL_ONLY), use_tqdm=False)
        beams = llm.beam_search(PROMPTS, BEAMS, concurrency_limit=1)
    return {output.prompt: output.outputs[0] for output in outputs}, beams


@pytest.fixture(scope="module")
def expected(offline):
    """Prompt -> what LLM gives."""
    return offline[0]


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    yield
    if "engine" in request.fixturenames:
        assert is_empty(request.getfixturevalue("engine"))


def is_empty(engine) -> bool:
    """Nothing is left in any table, in front of the core or in it."""

    async def settled() -> bool:
        usage = {m.name: m.value for m in await engine.get_metrics() if isinstance(m, Gauge)}
        return usage["vjax:kv_cache_usage_perc"] == usage["vjax:num_requests_running"] == 0

    assert asyncio.run(settled())  # and the engine has done all that it was asked to do before
    scheduler = engine._client._core.scheduler
    scheduler.check_integrity()
    outputs = engine._outputs
    tables = [engine._collectors, engine._client._calls, outputs._prompts, outputs._sequences]
    return not any(tables) and not scheduler.has_unfinished_requests and scheduler.num_waiting == 0


async def collect(engine, prompt, sampling_params, request_id, **options) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, sampling_params, request_id, **options)]


def joined(outputs: list[RequestOutput], index: int = 0) -> tuple[str, list[int]]:
    """Text and token ids of deltas."""
    completions = [c for output in outputs for c in output.outputs if c.index == index]
    return "".join(c.text for c in completions), [i for c in completions for i in c.token_ids]


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_outputs_are_those_of_llm(engine, expected, kind):
    async def main():
        return await asyncio.gather(*(collect(engine, p, params(kind), f"r-{p}") for p in PROMPTS))

    for prompt, outputs in zip(PROMPTS, asyncio.run(main()), strict=True):
        wanted, last = expected[prompt], outputs[-1]
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert last.outputs[0].finish_reason == wanted.finish_reason
        got = joined(outputs) if kind is DELTA else (last.outputs[0].text, last.outputs[0].token_ids)
        assert got == (wanted.text, wanted.token_ids)
        assert (len(outputs) == 1) == (kind is FINAL_ONLY)
        assert last.request_id == f"r-{prompt}" and last.prompt == prompt and last.metrics.num_generation_tokens == 12


def test_several_completions_and_stop_strings(engine):
    sampling = {"n": 3, "temperature": 1.0, "seed": 5, "stop": ["e"], "max_tokens": 30}

    async def main():
        (whole,) = await collect(engine, PROMPTS[0], params(FINAL_ONLY, **sampling), "whole")
        return whole, await collect(engine, PROMPTS[0], params(DELTA, **sampling), "deltas")

    whole, deltas = asyncio.run(main())
    assert [joined(deltas, c.index) for c in whole.outputs] == [(c.text, c.token_ids) for c in whole.outputs]
    assert any(c.stop_reason == "e" for c in whole.outputs) and not any("e" in c.text for c in whole.outputs)


def test_a_slow_consumer_gets_one_merged_delta(engine):
    async def main():
        whole = await collect(engine, PROMPTS[0], params(FINAL_ONLY, max_tokens=60, ignore_eos=True), "whole")
        slow = engine.generate(PROMPTS[0], params(max_tokens=60, ignore_eos=True), "slow")
        outputs = [await anext(slow)]
        # The slow one is finished when one that started later and needs more steps is.
        await collect(engine, PROMPTS[1], params(max_tokens=90, ignore_eos=True), "other")
        return whole, outputs + [output async for output in slow]

    whole, (first, second) = asyncio.run(main())
    assert joined([first, second]) == joined(whole)
    assert not first.finished and second.finished and len(second.outputs[0].token_ids) > 1


def test_who_stops_listening_aborts(engine):
    long = params(max_tokens=100, ignore_eos=True)

    async def breaks():
        async for _ in engine.generate(PROMPTS[0], long, "breaks"):
            break

    async def main():
        await breaks()
        started = asyncio.Event()

        async def is_cancelled():
            async for _ in engine.generate(PROMPTS[1], long, "cancelled"):
                started.set()

        task = asyncio.create_task(is_cancelled())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(ZeroDivisionError):
            async for _ in engine.generate(PROMPTS[2], long, "raises"):
                raise ZeroDivisionError
        while engine.get_num_unfinished_requests():
            await asyncio.sleep(0)  # the loop closes generators that nobody holds

    asyncio.run(main())


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_abort_gives_what_there_is(engine, kind):
    long = params(kind, max_tokens=100, ignore_eos=True)

    async def main():
        outputs = []
        tasks = [asyncio.create_task(collect(engine, PROMPTS[2], long, f"other-{i}")) for i in range(2)]
        stream = engine.generate(PROMPTS[0], long, "aborted")
        listener = engine.generate(PROMPTS[1], params(), "listener")
        if kind is FINAL_ONLY:
            waiting = asyncio.create_task(anext(stream))
            outputs.append(await anext(listener))
            await engine.abort("aborted")
            outputs = [await waiting]
        else:
            outputs.append(await anext(stream))
            await engine.abort(["aborted", "unknown"])
            outputs += [output async for output in stream]
        await engine.abort(["other-0", "other-1"])
        await listener.aclose()
        return outputs, await asyncio.gather(*tasks)

    outputs, others = asyncio.run(main())
    last = outputs[-1]
    assert last.finished and last.outputs[0].finish_reason == "abort"
    tokens = joined(outputs)[1] if kind is DELTA else last.outputs[0].token_ids
    assert len(tokens) < 100 and (tokens or kind is FINAL_ONLY)
    assert [each[-1].outputs[0].finish_reason for each in others] == ["abort", "abort"]


def test_an_id_is_refused_while_it_is_in_use_and_free_at_once_after_an_abort(engine, expected):
    async def main():
        first = engine.generate(PROMPTS[0], params(max_tokens=100, ignore_eos=True), "id")
        await anext(first)
        with pytest.raises(VjaxValidationError, match="'id' is in use"):
            await anext(engine.generate(PROMPTS[1], params(), "id"))
        await first.aclose()
        # Tokens of the first one are still on the way.
        return await collect(engine, PROMPTS[1], params(), "id")

    assert joined(asyncio.run(main())) == (expected[PROMPTS[1]].text, expected[PROMPTS[1]].token_ids)


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ("", params(), "empty"),
        ([5] * 256, params(), "256"),
        ([10**6], params(), "out of vocabulary"),
        ("x " * 20_000, params(), "longer than the maximum"),
        ("x", {"max_tokens": 3}, "SamplingParams"),
    ],
    ids=["empty", "long", "vocabulary", "long-text", "params"],
)
def test_a_bad_request_harms_nobody(engine, expected, prompt, sampling, message):
    async def main():
        good = [collect(engine, p, params(), p) for p in PROMPTS]
        return await asyncio.gather(*good, collect(engine, prompt, sampling, "bad"), return_exceptions=True)

    *good, bad = asyncio.run(main())
    assert [joined(outputs)[1] for outputs in good] == [expected[p].token_ids for p in PROMPTS]
    assert isinstance(bad, ValueError) and message in str(bad)


def test_what_could_never_run_is_refused_by_its_caller(engine, monkeypatch):
    """The core would refuse it too, but later and elsewhere."""
    from vjax.engine import client

    def full(request, max_model_len, num_blocks, block_size):
        return client_check(request, max_model_len, 2, block_size)

    client_check = client.check_request
    monkeypatch.setattr(client, "check_request", full)
    with pytest.raises(VjaxValidationError, match=r"need 2 KV blocks .* the cache has 1"):
        asyncio.run(collect(engine, PROMPTS[0], params(max_tokens=20), "big"))


def test_others_keywords(engine):
    with pytest.raises(VjaxValidationError, match=r"AsyncLLM\.generate"):
        asyncio.run(collect(engine, PROMPTS[0], params(), "r", lora_request=object()))
    with pytest.raises(TypeError, match=r"AsyncLLM\.generate\(\) got an unexpected"):
        asyncio.run(collect(engine, PROMPTS[0], params(), "r", prioritty=1))
    assert asyncio.run(collect(engine, PROMPTS[0], params(), "r", lora_request=None))[-1].finished


def test_500_callers_of_whom_some_give_up(engine, expected):
    """Nothing is lost, nothing is left."""
    num_requests, max_tokens = 500, 5
    rng = random.Random(1)

    async def caller(i: int) -> str:
        prompt, kind, fate = rng.choice(PROMPTS), rng.choice(list(RequestOutputKind)), rng.random()
        stream = engine.generate(prompt, params(kind, max_tokens), f"r{i}")
        outputs: list[RequestOutput] = []
        give_up_after = rng.randrange(3)
        async for output in stream:
            outputs.append(output)
            if fate < 0.2 and len(outputs) > give_up_after:
                await stream.aclose()
                return "left"
            if 0.2 <= fate < 0.4 and len(outputs) > give_up_after:
                await engine.abort(f"r{i}")
        completion = outputs[-1].outputs[0]
        tokens = joined(outputs)[1] if kind is DELTA else completion.token_ids
        assert tokens == expected[prompt].token_ids[: len(tokens)]
        assert completion.finish_reason == "abort" or len(tokens) == max_tokens
        return completion.finish_reason

    async def main():
        tasks = [asyncio.create_task(caller(i)) for i in range(num_requests)]
        cancelled = rng.sample(tasks, num_requests // 10)
        await asyncio.gather(*tasks[: num_requests // 20], return_exceptions=True)
        for task in cancelled:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    ends = asyncio.run(main())
    assert len(ends) == num_requests
    assert {end for end in ends if isinstance(end, str)} == {"left", "abort", "length"}
    assert {type(end) for end in ends if not isinstance(end, str)} <= {asyncio.CancelledError}


def test_callers_in_several_event_loops(engine, expected):
    results: dict[str, tuple] = {}

    def run(prompt: str) -> None:
        results[prompt] = joined(asyncio.run(collect(engine, prompt, params(), prompt)))

    threads = [threading.Thread(target=run, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {p: (expected[p].text, expected[p].token_ids) for p in PROMPTS}


def test_metrics_and_prefix_cache(engine):
    async def main():
        before = {m.name: m.value for m in await engine.get_metrics() if isinstance(m, Counter)}
        prompt = [7] * 40
        assert await engine.reset_prefix_cache()
        (cold,) = await collect(engine, prompt, params(FINAL_ONLY), "cold")
        (warm,) = await collect(engine, prompt, params(FINAL_ONLY), "warm")
        after = {m.name: m.value for m in await engine.get_metrics() if isinstance(m, Counter)}
        return cold, warm, {name: after[name] - before[name] for name in after}

    cold, warm, grown = asyncio.run(main())
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 32)
    assert grown["vjax:prompt_tokens"] == 80 and grown["vjax:prefix_cache_hits"] == 32
    assert warm.metrics.arrival_ts <= warm.metrics.scheduled_ts <= warm.metrics.first_token_ts


# ---- beam search, grammars, control -------------------------------------------------------------------------------


def test_beams_are_those_of_llm(engine, offline, expected):
    """Of several searches at once, while others generate."""

    async def main():
        searches = [engine.beam_search(p, f"b-{p}", BEAMS) for p in PROMPTS]
        return await asyncio.gather(*searches, *(collect(engine, p, params(), p) for p in PROMPTS))

    *found, _, _, _, last = asyncio.run(main())
    assert joined(last) == (expected[PROMPTS[3]].text, expected[PROMPTS[3]].token_ids)
    for output, wanted in zip(found[:4], offline[1], strict=True):
        for one, two in zip(output.sequences, wanted.sequences, strict=True):
            assert (one.tokens, one.text, one.finish_reason) == (two.tokens, two.text, two.finish_reason)
            assert one.cum_logprob == pytest.approx(two.cum_logprob, abs=1e-3)
            assert [e.keys() for e in one.logprobs] == [e.keys() for e in two.logprobs]
    assert not engine._searches


LONG_BEAMS = BeamSearchParams(beam_width=2, max_tokens=200, ignore_eos=True)


async def begun(engine, request_id: str, steps: int = 3) -> asyncio.Task:
    """A search that has come so far."""
    task = asyncio.create_task(engine.beam_search(PROMPTS[0], request_id, LONG_BEAMS))
    seen: set[str] = set()
    while len(seen) < steps:
        await asyncio.sleep(0)
        seen |= {core_id for core_id in list(engine._outputs._sequences) if f"beam_search-{request_id}-0" in core_id}
    return task


def test_who_leaves_a_beam_search_ends_it(engine):
    async def main():
        task = await begun(engine, "left")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.get_num_unfinished_requests() == 0 and not engine._searches

    asyncio.run(main())


@pytest.mark.parametrize("how", ["abort", "sleep"])
def test_an_aborted_beam_search_gives_what_it_has(engine, how):
    async def main():
        task = await begun(engine, "search")
        for call in (engine.beam_search(PROMPTS[1], "search", BEAMS), collect(engine, PROMPTS[1], params(), "search")):
            with pytest.raises(VjaxValidationError, match="'search' is in use"):
                await call
        if how == "abort":
            await engine.abort("search")
        else:
            await engine.sleep(0)
            await engine.wake_up()
        return await task

    sequences = asyncio.run(main()).sequences
    prompt = engine.get_tokenizer().encode(PROMPTS[0])
    assert [s.finish_reason for s in sequences] == ["abort"] * 2
    for sequence in sequences:
        assert sequence.tokens[: len(prompt)] == prompt and 2 <= len(sequence.tokens) - len(prompt) < 200
        assert sequence.text == engine.get_tokenizer().decode(sequence.tokens)
    assert not engine._searches


@pytest.mark.parametrize(
    ("prompt", "sampling", "request_id", "message"),
    [
        ("", BEAMS, "r", "empty"),
        ("x", params(), "r", "pass a BeamSearchParams"),
        ("x", BeamSearchParams(beam_width=11, max_tokens=2), "r", "needs the 22 most probable"),
        ("x", BEAMS, "", "request_id='' must be a non-empty string"),
    ],
)
def test_a_bad_beam_search(engine, prompt, sampling, request_id, message):
    with pytest.raises(VjaxValidationError, match=message):
        asyncio.run(engine.beam_search(prompt, request_id, sampling))
    assert not engine._searches


def test_callers_go_on_while_a_grammar_is_checked(engine, expected, monkeypatch):
    compiler = engine._inputs._grammars
    compile_, gate, begun = compiler._compile, threading.Event(), threading.Event()

    def slow(grammar: str):
        begun.set()
        assert gate.wait(30)
        return compile_(grammar)

    monkeypatch.setattr(compiler, "_compile", slow)
    constrained = params(FINAL_ONLY, structured_outputs={"choice": ["yes"]})

    async def main():
        waiting = asyncio.create_task(collect(engine, PROMPTS[0], constrained, "slow"))
        while not begun.is_set():
            await asyncio.sleep(0)
        other = await collect(engine, PROMPTS[1], params(), "other")
        assert not waiting.done()
        gate.set()
        return other, (await waiting)[-1].outputs[0].text

    other, text = asyncio.run(main())
    assert joined(other)[1] == expected[PROMPTS[1]].token_ids and text == "yes"


@pytest.mark.parametrize(("mode", "clear"), [("abort", False), ("wait", True), ("keep", True), ("keep", False)])
def test_pause_and_resume(engine, expected, mode, clear):
    wanted = expected[PROMPTS[0]].token_ids

    async def main():
        stream = engine.generate(PROMPTS[0], params(max_tokens=200, ignore_eos=True), "running")
        outputs = [await anext(stream)]
        await engine.pause_generation(mode=mode, clear_cache=clear)
        assert await engine.is_paused() and await engine.is_sleeping()
        late = asyncio.create_task(collect(engine, PROMPTS[0], params(), "late"))
        if mode != "keep":
            outputs += [output async for output in stream]
        # Answered when the late one was added long ago.
        usage = {m.name: m.value for m in await engine.get_metrics() if isinstance(m, Gauge)}
        keeps_its_place = mode == "keep" and not clear
        assert usage["vjax:num_requests_running"] == keeps_its_place and not late.done()
        await engine.resume_generation()
        assert not await engine.is_paused()
        outputs += [output async for output in stream]
        tokens = joined(outputs)[1]
        assert tokens[:12] == wanted[: len(tokens)] and (len(tokens) < 200) == (mode == "abort")
        assert outputs[-1].outputs[0].finish_reason == ("abort" if mode == "abort" else "length")
        last = await late
        assert joined(last)[1] == wanted
        await engine.resume_generation()
        with pytest.raises(VjaxValidationError, match="mode='stop' must be one of"):
            await engine.pause_generation(mode="stop")

    asyncio.run(main())


def test_a_call_may_time_out(engine):
    gate = threading.Event()

    async def main():
        with pytest.raises(TimeoutError):
            await engine.collective_rpc(lambda runner: gate.wait(30), timeout=0.01)
        gate.set()
        return await engine.collective_rpc(lambda runner, a, b: (type(runner).__name__, a, b), (1,), {"b": 2})

    assert asyncio.run(main()) == [("ModelRunner", 1, 2)]


def test_what_is_known_of_the_model(engine):
    assert asyncio.run(engine.get_model_config()) is engine.model_config is engine.config.model
    assert engine.model_config.max_model_len == 256


def test_names_that_users_of_vllm_know():
    from vjax import AsyncLLMEngine
    from vjax.v1.engine import async_llm, exceptions

    assert AsyncLLM is AsyncLLMEngine is async_llm.AsyncLLM and EngineDeadError is exceptions.EngineDeadError
    assert not AsyncEngineArgs().disable_log_stats and AsyncEngineArgs(disable_log_stats=True).disable_log_stats


# ---- engines that end, on a device that is none -------------------------------------------------------------------


class Device:
    """Samples token 5; step number `fails` raises."""

    def __init__(self, fails: int | None):
        self.fails, self.is_shut_down = fails, False

    def execute(self, scheduled):
        if scheduled.step_id == self.fails:
            raise ZeroDivisionError("planted")
        output = StepOutput(scheduled.step_id, [5] * scheduled.num_sampled)
        return SimpleNamespace(result=lambda: output)

    def shutdown(self):
        self.is_shut_down = True


@pytest.fixture
def simulated(monkeypatch):
    """Makes engines on a `Device`."""

    def make(fails: int | None = None) -> AsyncLLM:
        cache = CacheConfig(block_size=16, num_gpu_blocks=129)
        scheduler = SchedulerConfig(8, 128, 256, async_scheduling=True)
        model = ModelConfig("m", "m", True, "float32", 0, 256)
        config = EngineConfig(model, cache, scheduler, LoadConfig(), True, True)
        core = EngineCore(make_scheduler(scheduler, cache), Device(fails), async_scheduling=True)
        built = BuiltEngine(core, config, SimpleNamespace(vocab_size=1000, eos_token_ids=()), None)
        monkeypatch.setattr("vjax.engine.builder.build_engine", lambda args: built)
        return AsyncLLM(AsyncEngineArgs(), multiprocess=False)

    return make


ENDLESS = params(max_tokens=255, ignore_eos=True)
IDS = [[7], [8], [9, 10]]


def test_the_engine_goes_with_its_last_reference(simulated):
    engine = simulated()
    device, thread, gone = engine._client._core.runner, engine._client._thread, weakref.ref(engine)
    assert asyncio.run(collect(engine, [7], params(max_tokens=3), "r"))[-1].finished
    assert thread.is_alive() and engine.is_running and not engine.errored and not device.is_shut_down
    del engine
    thread.join(10)  # it may have been about to return from a method of the engine, and then shuts it down itself
    assert gone() is None and not thread.is_alive() and device.is_shut_down


def test_a_dead_engine_is_reported_to_every_waiter(simulated):
    engine = simulated(fails=100)

    async def main():
        await engine.check_health()
        ends = await asyncio.gather(*(collect(engine, ids, ENDLESS, str(ids)) for ids in IDS), return_exceptions=True)
        with pytest.raises(EngineDeadError, match="planted"):
            await engine.check_health()
        with pytest.raises(EngineDeadError, match="planted"):
            await collect(engine, [7], ENDLESS, "late")
        with pytest.raises(EngineDeadError, match="planted"):
            await engine.reset_prefix_cache()
        return ends

    ends = asyncio.run(main())
    assert [type(end) for end in ends] == [EngineDeadError] * 3 and len(set(map(id, ends))) == 3
    assert all("ZeroDivisionError: planted" in str(end) for end in ends)
    assert isinstance(ends[0].__cause__, ZeroDivisionError)
    assert engine.errored and not engine.is_running and engine.get_num_unfinished_requests() == 0
    assert not engine._outputs._sequences
    engine.shutdown()


def test_shutdown_ends_every_wait(simulated):
    engine = simulated()

    async def main():
        stream = engine.generate([7], ENDLESS, "r")
        await anext(stream)
        waiting = asyncio.create_task(collect(engine, [8], ENDLESS, "s"))
        await asyncio.sleep(0)
        engine.shutdown()
        with pytest.raises(EngineDeadError, match="shut down"):
            await waiting
        with pytest.raises(EngineDeadError, match="shut down"):
            await collect(engine, [9], params(), "late")

    asyncio.run(main())
    assert engine.is_stopped and not engine.errored
    engine.shutdown()


# ---- the collector alone ------------------------------------------------------------------------------------------


def output(*completions: CompletionOutput, finished: bool = False) -> RequestOutput:
    return RequestOutput("r", "p", [1], list(completions), finished)


@pytest.mark.parametrize("delta", [True, False])
def test_outputs_that_wait_are_merged(delta):
    def step(index: int, text: str, token_ids: list[int], reason: str | None = None) -> RequestOutput:
        return output(CompletionOutput(index, text, token_ids, finish_reason=reason), finished=reason is not None)

    async def main():
        collector = OutputCollector(asyncio.get_running_loop(), delta=delta)
        taking = asyncio.create_task(collector.get())
        await asyncio.sleep(0)
        waiter = collector.put(step(0, "a", [1]))
        assert waiter is not None
        wake([waiter])
        first = await taking
        rest = [step(1, "x", [7]), step(0, "b" if delta else "ab", [2] if delta else [1, 2])]
        rest += [step(1, "y" if delta else "xy", [8] if delta else [7, 8], "stop")]
        assert [collector.put(each) for each in rest] == [None] * 3
        return first, await collector.get()

    first, second = asyncio.run(main())
    assert (first.outputs[0].text, first.finished) == ("a", False)
    wanted = [(0, "b", [2], None), (1, "xy", [7, 8], "stop")] if delta else None
    wanted = wanted or [(0, "ab", [1, 2], None), (1, "xy", [7, 8], "stop")]
    assert [(c.index, c.text, c.token_ids, c.finish_reason) for c in second.outputs] == wanted
    assert second.finished
