"""An engine core whose grammars take as long to compile as the tests say, on a device that draws the lowest token."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from vjax import EngineDeadError, SamplingParams, StructuredOutputsParams, VjaxValidationError
from vjax.config.cache import CacheConfig
from vjax.config.engine_config import EngineConfig, LoadConfig, ModelConfig
from vjax.config.scheduler import SchedulerConfig
from vjax.engine.client import ThreadClient
from vjax.engine.core import EngineCore
from vjax.engine.protocol import EngineInfo, Outputs
from vjax.errors import EngineAsleepError
from vjax.messages import EngineOutput, EngineRequest, StepOutput, mask_width
from vjax.scheduler.factory import make_scheduler
from vjax.structured.compiler import GrammarCompiler
from vjax.structured.grammar import grammar_text
from vjax.structured.matcher import GrammarMatcher
from vjax.text.load import load_tokenizer

EOS, PLAIN, VOCAB_SIZE = 0, 5, 4096
CACHE = CacheConfig(block_size=16, num_gpu_blocks=129)
SCHEDULER = SchedulerConfig(4, 64, 128, async_scheduling=True)


class Device:
    """Draws the lowest token of those that a grammar leaves, and PLAIN where there is none."""

    asleep = frozenset()

    def __init__(self) -> None:
        self.num_steps = 0

    def execute(self, scheduled, fill_mask: Callable[[np.ndarray], None] | None = None):
        self.num_steps += 1
        mask = np.full((scheduled.num_sampled, mask_width(VOCAB_SIZE)), -1, np.int32)
        if fill_mask is not None:
            fill_mask(mask)
        bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")[:, :VOCAB_SIZE]
        tokens = [PLAIN if row.all() else int(row.argmax()) for row in bits]
        return SimpleNamespace(result=lambda: StepOutput(scheduled.step_id, tokens))

    def wake_up(self, tags) -> None:
        pass

    def shutdown(self) -> None:
        pass


class Gated(GrammarCompiler):
    """Compiles a grammar once `open` was called for it."""

    def __init__(self, tokenizer):
        super().__init__(lambda: tokenizer, vocab_size=VOCAB_SIZE, eos_token_ids=lambda _: [EOS])
        self.gates: dict[str, threading.Event] = {}
        self.compiled: list[str] = []

    def matcher(self, grammar: str) -> GrammarMatcher:
        assert self.gates.setdefault(grammar, threading.Event()).wait(30)
        self.compiled.append(grammar)
        return super().matcher(grammar)

    def open(self, grammar: str) -> None:
        self.gates.setdefault(grammar, threading.Event()).set()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("vjax-tiny")


class Client:
    """A core in its thread, and all that it has said."""

    def __init__(self, compiler: Gated, overlap: bool = True):
        self.compiler, self.device = compiler, Device()
        self.core = EngineCore(
            make_scheduler(SCHEDULER, CACHE),
            self.device,  # pyright: ignore[reportArgumentType]
            async_scheduling=overlap,
            grammars=compiler,
        )
        config = EngineConfig(
            ModelConfig("m", "m", True, "float32", 0, 128), CACHE, SCHEDULER, LoadConfig(), True, True
        )
        self.said: queue.SimpleQueue[EngineOutput] = queue.SimpleQueue()
        self.client = ThreadClient(self.core, EngineInfo(config, VOCAB_SIZE, ()), self.take, self.died)

    def take(self, message: Outputs) -> None:
        for output in message.outputs:
            self.said.put(output)

    def died(self, error: EngineDeadError) -> None:
        self.said.put(EngineOutput("", [], "error", error=str(error)))

    def call(self, method: str, *arguments):
        return self.client.call(method, *arguments).result(30)

    def wait_for(self, request_id: str) -> tuple[list[int], EngineOutput]:
        """Its tokens and its last output; nothing else may come meanwhile."""
        tokens: list[int] = []
        while True:
            output = self.said.get(timeout=30)
            assert output.request_id == request_id, output
            tokens += output.new_token_ids
            if output.finish_reason is not None:
                return tokens, output


@pytest.fixture
def client(tokenizer):
    client = Client(Gated(tokenizer))
    yield client
    for gate in client.compiler.gates.values():
        gate.set()
    client.client.shutdown()


def text_grammar(text: str) -> str:
    return grammar_text(StructuredOutputsParams(choice=[text]))


YES, NO = text_grammar("yes"), text_grammar("no")


def request(request_id: str, grammar: str | None = None, max_tokens: int = 8) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens, seed=0)
    return EngineRequest(request_id, [7, 8, 9], params, EOS, 0.0, grammar=grammar)


def written(tokenizer, text: str) -> list[int]:
    return [*tokenizer.encode(text, add_special_tokens=False), EOS]


def test_others_go_on_meanwhile(client: Client, tokenizer):
    client.client.add_requests([request("slow", YES), request("other")])
    assert client.wait_for("other")[0] == [PLAIN] * 8
    stats = client.call("stats")
    assert (stats.num_running, stats.num_waiting) == (0, 1)
    assert client.core.has_unfinished_requests and not client.core.has_work
    # Nothing runs while it waits, whatever else is asked.
    num_steps, schedule = client.device.num_steps, client.core.scheduler.schedule
    calls = []
    client.core.scheduler.schedule = lambda: calls.append(0) or schedule()  # pyright: ignore[reportAttributeAccessIssue]
    for _ in range(3):
        client.call("stats")
    assert client.device.num_steps == num_steps and not calls
    client.compiler.open(YES)
    tokens, output = client.wait_for("slow")
    assert tokens == written(tokenizer, "yes") and output.finish_reason == "stop"
    assert not client.core.has_unfinished_requests and len(calls) <= len(tokens) + 2
    client.core.scheduler.check_integrity()


def test_a_grammar_that_is_none_fails_its_request_alone(client: Client, tokenizer):
    bad = grammar_text(StructuredOutputsParams(grammar="start: missing"))
    client.client.add_requests([request("bad", bad), request("good", YES)])
    client.compiler.open(bad)
    tokens, output = client.wait_for("bad")
    assert not tokens and output.finish_reason == "error" and output.error is not None and "missing" in output.error
    client.compiler.open(YES)
    assert client.wait_for("good")[0] == written(tokenizer, "yes")


def test_abort_meanwhile(client: Client, tokenizer):
    """The id comes back at once, with another grammar."""
    client.client.add_requests([request("id", YES)])
    assert client.call("abort_requests", ["id"]) == ["id"]
    assert not client.core.has_unfinished_requests
    client.client.add_requests([request("id", NO)])
    client.compiler.open(YES)
    client.client.add_requests([request("other", YES)])
    assert client.wait_for("other")[0] == written(tokenizer, "yes")
    assert client.call("stats").num_waiting == 1
    client.compiler.open(NO)
    assert client.wait_for("id")[0] == written(tokenizer, "no")


def test_who_waits_for_the_same_grammar_shares_it(client: Client, tokenizer):
    client.client.add_requests([request("a", YES)])
    client.client.add_requests([request("b", YES, max_tokens=1)])
    client.call("stats")
    client.compiler.open(YES)
    outputs = [client.said.get(timeout=30) for _ in range(len(written(tokenizer, "yes")) + 1)]
    tokens = {i: [t for o in outputs if o.request_id == i for t in o.new_token_ids] for i in "ab"}
    assert tokens == {"a": written(tokenizer, "yes"), "b": written(tokenizer, "yes")[:1]}
    # Known from now on: it does not wait.
    client.client.add_requests([request("c", YES)])
    assert client.wait_for("c")[0] == tokens["a"] and client.compiler.compiled == [YES]


def test_asleep_meanwhile(client: Client, tokenizer):
    client.client.add_requests([request("slow", YES)])
    client.call("sleep", 0)
    client.compiler.open(YES)
    assert client.call("stats").num_waiting == 1 and not client.device.num_steps
    client.call("wake_up")
    assert client.wait_for("slow")[0] == written(tokenizer, "yes")


@pytest.mark.parametrize("overlap", [False, True])
def test_a_core_that_is_stepped_waits(tokenizer, overlap: bool):
    """A step with nothing else to do waits for the grammar: no step is for nothing."""
    compiler = Gated(tokenizer)
    core = EngineCore(
        make_scheduler(SCHEDULER, CACHE),
        Device(),  # pyright: ignore[reportArgumentType]
        async_scheduling=overlap,
        grammars=compiler,
    )
    core.add_request(request("slow", YES))
    with pytest.raises(VjaxValidationError, match="'slow' belongs to"):
        core.add_request(request("slow", NO))
    core.sleep(0)
    with pytest.raises(EngineAsleepError):
        core.step()
    core.wake_up()
    threading.Thread(target=compiler.open, args=(YES,)).start()
    tokens, steps = [], 0
    while core.has_unfinished_requests:
        tokens += [token for output in core.step() for token in output.new_token_ids]
        steps += 1
    assert tokens == written(tokenizer, "yes") and steps <= len(tokens) + 1
    core.shutdown()


def test_shutdown_meanwhile(tokenizer):
    """Nobody waits for the compiler."""
    client = Client(Gated(tokenizer))
    client.client.add_requests([request("slow", YES)])
    client.call("stats")
    client.client.shutdown()
    client.compiler.open(YES)
    assert client.said.empty()


def test_a_grammar_is_compiled_once_for_all_threads(tokenizer, monkeypatch):
    compiler = GrammarCompiler(lambda: tokenizer, vocab_size=VOCAB_SIZE, eos_token_ids=lambda _: [EOS])
    compile_, gate, begun = compiler._compile, threading.Event(), []
    bad = text_grammar("yes").replace("yes", "\\")

    def slow(grammar: str):
        begun.append(grammar)
        assert gate.wait(30)
        return compile_(grammar)

    monkeypatch.setattr(compiler, "_compile", slow)
    ends: list[object] = []

    def run(grammar: str) -> None:
        try:
            ends.append(compiler.matcher(grammar))
        except VjaxValidationError as e:
            ends.append(e)

    threads = [threading.Thread(target=run, args=(g,)) for g in (YES, YES, YES, bad, bad)]
    for thread in threads:
        thread.start()
    assert compiler.ready(YES) is None
    gate.set()
    for thread in threads:
        thread.join()
    assert begun.count(YES) == 1
    matchers = [end for end in ends if isinstance(end, GrammarMatcher)]
    assert len(matchers) == 3 and len({id(m.matcher) for m in matchers}) == 3 and len(ends) == 5
    assert compiler.ready(YES) is not None and compiler.ready(bad) is None
