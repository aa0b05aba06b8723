"""The engine core in a process of its own, on the bundled model: what crosses, and what happens when a side dies."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import queue
import re
import select
import signal
import subprocess
import sys
import threading

import pytest

from vjax import (
    LLM,
    AsyncEngineArgs,
    AsyncLLM,
    BeamSearchParams,
    ConfigError,
    EngineDeadError,
    ModelRegistry,
    OutOfMemoryError,
    RequestOutputKind,
    SamplingParams,
    VjaxValidationError,
)
from vjax.engine.builder import build_engine
from vjax.engine.client import EngineClient, ThreadClient
from vjax.engine.protocol import EngineInfo, Reply
from vjax.metrics import Gauge
from vjax.models import registry
from vjax.models.decoder import DecoderModel

#: As in other tests, so that what they compiled is found.
SMALL = {"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 16 << 20}
PROMPTS = ["def add(a, b):", "import os", "class Node:", "for i in range("]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, output_kind=RequestOutputKind.FINAL_ONLY)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
#: Completions that need everything of the parameters that crosses: child seeds, masked ids, and stops of both kinds.
SAMPLED = SamplingParams(
    n=2, seed=-2, temperature=0.9, top_k=30, top_p=0.9, min_p=0.01, min_tokens=4, max_tokens=12, stop=["("],
    stop_token_ids=[7], output_kind=RequestOutputKind.FINAL_ONLY,
)  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    with AsyncLLM.from_engine_args(AsyncEngineArgs(model="vjax-tiny", **SMALL)) as engine:
        yield engine


@pytest.fixture(scope="module")
def llm():
    with LLM("vjax-tiny", **SMALL) as llm:
        yield llm


async def collect(engine, prompt, params, request_id) -> list:
    return [output async for output in engine.generate(prompt, params, request_id)]


def completions(outputs) -> list[tuple]:
    return [(o.request_id[-1], c.text, c.token_ids, c.finish_reason, c.stop_reason) for o in outputs for c in o.outputs]


def test_outputs_are_those_of_llm(engine, llm):
    prompts, params = [*PROMPTS, PROMPTS[0]], [GREEDY] * 4 + [SAMPLED]

    async def main():
        ends = [collect(engine, p, s, str(i)) for i, (p, s) in enumerate(zip(prompts, params, strict=True))]
        return [output for (output,) in await asyncio.gather(*ends)]

    assert completions(asyncio.run(main())) == completions(llm.generate(prompts, params, use_tqdm=False))


def test_times_and_counts_cross(engine):
    async def main():
        assert await engine.reset_prefix_cache()
        (cold,) = await collect(engine, [9] * 40, GREEDY, "cold")
        (warm,) = await collect(engine, [9] * 40, GREEDY, "warm")
        assert not engine._client._progress._requests
        return cold, warm, {m.name: m.value for m in await engine.get_metrics() if not hasattr(m, "buckets")}

    cold, warm, metrics = asyncio.run(main())
    assert (cold.num_cached_tokens, warm.num_cached_tokens, warm.metrics.num_cached_tokens) == (0, 32, 32)
    assert warm.metrics.queued_ts <= warm.metrics.scheduled_ts <= warm.metrics.first_token_ts
    assert metrics["vjax:prefix_cache_hits"] >= 32 and metrics["vjax:generation_tokens"] >= 24


def test_aborted_and_bad_requests_leave_nothing(engine, llm):
    expected = completions(llm.generate(PROMPTS[0], GREEDY, use_tqdm=False))[0][1:]

    async def main():
        left = engine.generate(PROMPTS[1], ENDLESS, "id")
        await anext(left)
        await left.aclose()
        # The same id at once, while tokens of the first are on the way.
        good = asyncio.create_task(collect(engine, PROMPTS[0], GREEDY, "id"))
        with pytest.raises(VjaxValidationError, match="out of vocabulary"):
            await collect(engine, [10**6], GREEDY, "bad")
        aborted = asyncio.create_task(collect(engine, PROMPTS[2], ENDLESS, "aborted"))
        (output,) = await good
        await engine.abort("aborted")
        assert (await aborted)[-1].outputs[0].finish_reason == "abort"
        # Answered after the abort, which came first.
        gauges = {m.name: m.value for m in await engine.get_metrics() if isinstance(m, Gauge)}
        assert gauges["vjax:kv_cache_usage_perc"] == gauges["vjax:num_requests_running"] == 0
        return output

    assert completions([asyncio.run(main())])[0][1:] == expected
    assert engine.get_num_unfinished_requests() == 0 and not engine._client._progress._requests


def test_a_call_that_raises_in_the_process_raises_here(engine):
    with pytest.raises(TypeError, match="least_bytes_read"):
        engine._client.call("least_bytes_read").result()
    assert engine._client.call("least_bytes_read", 1).result().keys() == {"weights", "KV cache"}


def test_grammars_cross(engine):
    """Refused here; followed there, where the tokenizer is read for the first of them."""

    def constrained(regex: str) -> SamplingParams:
        return dataclasses.replace(GREEDY, structured_outputs={"regex": regex})  # pyright: ignore

    async def main():
        good = asyncio.create_task(collect(engine, PROMPTS[0], constrained("[a-c]{2}-[0-9]"), "good"))
        with pytest.raises(VjaxValidationError, match="refused by llguidance"):
            await collect(engine, PROMPTS[0], constrained("[a-c"), "bad")
        return await good

    (output,) = asyncio.run(main())
    assert re.fullmatch("[a-c]{2}-[0-9]", output.outputs[0].text) and output.outputs[0].finish_reason == "stop"


def test_beam_search_crosses(engine, llm):
    beams = BeamSearchParams(beam_width=3, max_tokens=6)

    async def main():
        left = asyncio.create_task(engine.beam_search(PROMPTS[1], "left", dataclasses.replace(beams, max_tokens=200)))
        found = await asyncio.gather(*(engine.beam_search(p, p, beams) for p in PROMPTS))
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        return found

    for one, two in zip(asyncio.run(main()), llm.beam_search(PROMPTS, beams, concurrency_limit=1), strict=True):
        assert [(s.tokens, s.text) for s in one.sequences] == [(s.tokens, s.text) for s in two.sequences]
    assert engine.get_num_unfinished_requests() == 0 and not engine._client._progress._requests


def test_control_crosses(engine, llm):
    """Sleep, new weights and calls; more of it is tested with the core in a thread, which obeys in the same way."""
    (wanted,) = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    wanted = wanted.outputs[0].token_ids

    async def main():
        running = engine.generate(PROMPTS[0], ENDLESS, "running")
        first = [await anext(running)]
        await engine.sleep(1, "keep")
        assert await engine.is_sleeping()
        late = asyncio.create_task(collect(engine, PROMPTS[0], GREEDY, "late"))
        weights = await engine.get_weights(["norm"])
        await engine.wake_up(["weights"])
        assert await engine.is_sleeping() and not late.done()
        await engine.update_weights(weights, partial=True)
        await engine.wake_up(["kv_cache"])
        assert not await engine.is_sleeping()
        assert (await late)[-1].outputs[0].token_ids == wanted
        await engine.abort("running")
        first += [output async for output in running]
        assert [t for output in first for t in output.outputs[0].token_ids][:12] == wanted
        await engine.pause_generation()
        assert await engine.is_paused()
        await engine.resume_generation()
        assert await engine.collective_rpc("warm_up", (0,), timeout=60) == [None]
        assert await engine.reset_prefix_cache(reset_running_requests=True)
        with pytest.raises(VjaxValidationError, match="profiler_dir"):
            await engine.start_profile()
        with pytest.raises(RuntimeError, match="start_profile"):
            await engine.stop_profile()
        assert (await engine.get_model_config()).max_model_len == 256
        assert engine.get_tokenizer().encode("a") == llm.get_tokenizer().encode("a")

    asyncio.run(main())


def test_a_killed_process_is_reported_to_every_waiter(engine):
    """The last test of the module's engine."""

    async def main():
        streams = [engine.generate(p, ENDLESS, p) for p in PROMPTS]
        for stream in streams:
            await anext(stream)
        call = engine._client.call("warm_up")
        os.kill(engine._client.pid, signal.SIGKILL)

        async def rest(stream):
            return [output async for output in stream]

        waits = [*map(rest, streams), asyncio.wrap_future(call)]
        ends = await asyncio.wait_for(asyncio.gather(*waits, return_exceptions=True), timeout=5)
        with pytest.raises(EngineDeadError, match="signal 9"):
            await engine.check_health()
        with pytest.raises(EngineDeadError, match="signal 9"):
            await collect(engine, PROMPTS[0], GREEDY, "late")
        return ends

    ends = asyncio.run(main())
    assert [type(end) for end in ends] == [EngineDeadError] * 5
    assert all("ended by signal 9 (Killed)" in str(end) for end in ends)
    assert engine.errored and not engine.is_running and engine.get_num_unfinished_requests() == 0
    engine.shutdown()
    assert not engine._client._reader.is_alive() and not os.path.exists(engine._client._folder)


def test_what_fails_at_the_start_is_raised_here():
    """The same exception as without a process, and no child is left."""
    args = AsyncEngineArgs("vjax-tiny", **(SMALL | {"num_gpu_blocks_override": 4}))
    with pytest.raises(OutOfMemoryError) as wanted:
        build_engine(args)
    threads = set(threading.enumerate())
    with pytest.raises(OutOfMemoryError) as got:
        AsyncLLM(args)
    assert str(got.value) == str(wanted.value) and got.value.parameter == wanted.value.parameter
    assert "step_geometry" in str(got.value.__cause__)
    assert set(threading.enumerate()) == threads


def test_a_model_class_that_the_process_cannot_import_is_refused(monkeypatch):
    class Mine(DecoderModel):
        pass

    monkeypatch.setattr(registry, "_registered", {})
    ModelRegistry.register_model("Elsewhere", "some.module:Model")
    ModelRegistry.register_model("LlamaForCausalLM", Mine)
    assert registry.registered_models() == {"Elsewhere": "some.module:Model"}
    with pytest.raises(ConfigError, match="LlamaForCausalLM is defined in the main program"):
        AsyncLLM(AsyncEngineArgs())


_PARENT = """
import os, signal, sys, threading
from vjax.config.engine_args import EngineArgs
from vjax.engine.process_client import ProcessClient
class Front:
    def outputs(self, message): ...
    def died(self, error): ...
front = Front()
client = ProcessClient(EngineArgs(), front.outputs, front.died)
print(client.pid, client._folder, flush=True)
sys.stdin.readline()
if sys.argv[1] == "SIGINT":
    # The worst moment: a lock written in Python is taken, and would stay so.
    enter = threading.Condition.__enter__
    def interrupted(self):
        enter(self)
        if threading.current_thread() is threading.main_thread():
            os.kill(os.getpid(), signal.SIGINT)
    threading.Condition.__enter__ = interrupted
    client.wait_until_ready()
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_the_process_ends_with_its_parent(name):
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, name],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as parent:  # fmt: skip
        pid, folder = parent.stdout.readline().split()
        child = os.pidfd_open(int(pid))
        try:
            if name == "SIGINT":
                parent.stdin.write("\n")
                parent.stdin.flush()
            parent.send_signal(getattr(signal, name))
            parent.communicate(timeout=60)
            assert select.select([child], [], [], 20)[0], "the child is still there"
        finally:
            os.close(child)
            parent.kill()
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    assert parent.returncode == -getattr(signal, name)
    assert not os.path.exists(folder)


class Echo(EngineClient):
    """Calls are answered by their arguments, in a thread."""

    def __init__(self):
        super().__init__(self.ignore, self.ignore)
        self.commands = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.answer, daemon=True)
        self.thread.start()

    def ignore(self, what): ...

    def answer(self):
        while (command := self.commands.get()) is not None:
            self._take(Reply(command.call_id, command.arguments))

    def _post(self, command):
        self.commands.put(command)

    def shutdown(self):
        self.commands.put(None)
        self.thread.join(10)


@pytest.mark.parametrize("moment", range(3))
def test_an_interrupted_call_leaves_the_reader_unharmed(monkeypatch, moment):
    """Ctrl-C as a lock written in Python is taken, which then stays so: no other thread may wait for that lock."""
    client, enter, num_entered = Echo(), threading.Condition.__enter__, 0

    def interrupted(self):
        nonlocal num_entered
        enter(self)
        if threading.current_thread() is threading.main_thread():
            num_entered += 1
            if num_entered == moment + 1:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Condition, "__enter__", interrupted)
        # At the third moment nothing is interrupted any more.
        with pytest.raises(KeyboardInterrupt) if moment < 2 else contextlib.nullcontext():
            assert client.wait_for("name", 1).result() == (1,)
    client.shutdown()
    assert not client.thread.is_alive()


# ---- LLM as the client, with a thread in the place of the process ---------------------------------------------------


def test_llm_with_its_core_elsewhere(llm, monkeypatch):
    """The last test of the module's LLM, whose core it takes."""
    prompts, params = [*PROMPTS, PROMPTS[0]], [GREEDY] * 4 + [SAMPLED]
    wanted = [c[1:] for c in completions(llm.generate(prompts, params, use_tqdm=False))]

    def start(args, on_outputs, on_death):
        front = llm.llm_engine
        info = EngineInfo(dataclasses.replace(front.config, disable_log_stats=False), front.vocab_size, ())
        return ThreadClient(front._core, info, on_outputs, on_death), front.tokenizer

    monkeypatch.setenv("VJAX_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setattr("vjax.engine.process_core.start_process", start)
    stepped = LLM("vjax-tiny", **SMALL, disable_log_stats=False)
    assert [c[1:] for c in completions(stepped.generate(prompts, params, use_tqdm=False))] == wanted
    engine = stepped.llm_engine
    assert not engine.has_unfinished_requests()
    engine.add_request("id", PROMPTS[0], ENDLESS)
    while not engine.step():
        pass
    engine.abort_request("id")
    engine.add_request("id", PROMPTS[0], GREEDY)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert completions(outputs)[0][1:] == wanted[0]
    gauges = {m.name: m.value for m in stepped.get_metrics() if isinstance(m, Gauge)}
    assert gauges["vjax:kv_cache_usage_perc"] == 0 and stepped.reset_prefix_cache()
    with pytest.raises(VjaxValidationError, match="VJAX_ENABLE_V1_MULTIPROCESSING=0"), engine.record_steps():
        pass

    def failing():
        raise ZeroDivisionError("planted")

    engine._core._client._core.step = failing
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="planted"):
            stepped.generate(PROMPTS[0], GREEDY, use_tqdm=False)
