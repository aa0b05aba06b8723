from __future__ import annotations

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from vjax.config.cache import CacheConfig
from vjax.engine.input_processor import ProcessedRequest
from vjax.engine.output_processor import OutputProcessor
from vjax.engine.recorder import MetricsRecorder
from vjax.messages import EngineOutput, EngineRequest
from vjax.outputs import RequestOutput
from vjax.sampling_params import RequestOutputKind, SamplingParams
from vjax.text.tokenizer import Tokenizer

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    return Tokenizer(backend, {"eos_token": "<|end|>"})


def request(request_id: str, kind: RequestOutputKind = CUMULATIVE, n: int = 1, **fields) -> ProcessedRequest:
    params = SamplingParams(n=n, output_kind=kind, seed=0, **fields)
    ids = [request_id] if n == 1 else [f"{i}_{request_id}" for i in range(n)]
    requests = [EngineRequest(i, [1, 2], params, None, 10.0) for i in ids]
    return ProcessedRequest(request_id, "prompt", [1, 2], params, requests, 10.0)


class Engine:
    """An output processor fed with text instead of ids."""

    def __init__(self, tokenizer: Tokenizer | None, **options):
        self.tokenizer = tokenizer
        self.processor = OutputProcessor(tokenizer, **options)
        self.records: list[EngineOutput] = []

    def add(self, *args, **fields) -> None:
        self.processor.add_request(request(*args, **fields))

    def step(self, *outputs: tuple) -> tuple[list[RequestOutput], list[str]]:
        """Each output: (request id, text or ids, finish reason or None, stop reason or None)."""
        self.records = []
        for request_id, new, *rest in outputs:
            assert self.tokenizer is not None or not isinstance(new, str)
            ids = self.tokenizer.encode(new) if isinstance(new, str) and self.tokenizer else new
            reason, stop_reason, *_ = (*rest, None, None)
            self.records.append(EngineOutput(request_id, list(ids), reason, stop_reason, num_cached_tokens=1))
        return self.processor.process(self.records)


@pytest.fixture
def engine(tokenizer) -> Engine:
    return Engine(tokenizer)


def test_cumulative(engine):
    engine.add("a")
    (first,), _ = engine.step(("a", "he"))
    (second,), _ = engine.step(("a", "llo"))
    (last,), to_abort = engine.step(("a", "!", "length"))
    texts = [out.outputs[0].text for out in (first, second, last)]
    assert texts == ["he", "hello", "hello!"]
    assert [len(out.outputs[0].token_ids) for out in (first, second, last)] == [2, 5, 6]
    assert [out.finished for out in (first, second, last)] == [False, False, True]
    assert (last.outputs[0].finish_reason, last.outputs[0].stop_reason) == ("length", None)
    assert (last.request_id, last.prompt, last.prompt_token_ids, last.num_cached_tokens) == ("a", "prompt", [1, 2], 1)
    assert (to_abort, engine.processor.num_unfinished, engine.processor.has_request("a")) == ([], 0, False)


def test_delta_holds_back_what_may_become_a_stop_string(engine):
    engine.add("a", DELTA, stop=["END"])
    pieces = []
    for new in ("one EN", "", "", "E", "xtra", "."):
        outputs, to_abort = engine.step(("a", new))
        assert to_abort == []
        pieces += [(o.outputs[0].text, len(o.outputs[0].token_ids)) for o in outputs]
    assert pieces == [("one ", 6), ("E", 1), ("NExt", 4), ("r", 1)]
    (last,), to_abort = engine.step(("a", "ENDmore"))
    assert (last.outputs[0].text, len(last.outputs[0].token_ids), last.finished) == ("a.", 3, True)
    assert (last.outputs[0].finish_reason, last.outputs[0].stop_reason) == ("stop", "END")
    assert to_abort == ["a"]
    assert (engine.records[0].finish_reason, engine.records[0].stop_reason) == ("stop", "END")
    assert engine.step(("a", "late")) == ([], [])


@pytest.mark.parametrize("detokenize", [True, False])
def test_final_only(engine, tokenizer, detokenize):
    engine.add("a", FINAL_ONLY, detokenize=detokenize)
    assert engine.step(("a", "he")) == ([], [])
    assert engine.step(("a", "llo")) == ([], [])
    (out,), _ = engine.step(("a", [tokenizer.eos_token_id], "stop"))
    assert out.outputs[0].text == ("hello" if detokenize else "")
    assert out.outputs[0].token_ids == [*tokenizer.encode("hello"), tokenizer.eos_token_id]
    assert (out.outputs[0].finish_reason, out.outputs[0].stop_reason, out.finished) == ("stop", None, True)


def test_stop_token_is_in_the_ids_and_not_in_the_text(engine, tokenizer):
    stop_id = tokenizer.encode("!")[0]
    engine.add("a", FINAL_ONLY, stop_token_ids=[stop_id])
    (out,), _ = engine.step(("a", "hi!", "stop", stop_id))
    completion = out.outputs[0]
    assert (completion.text, completion.token_ids[-1], completion.stop_reason) == ("hi", stop_id, stop_id)


def test_stop_string_on_the_last_token_is_a_stop(engine):
    engine.add("a", FINAL_ONLY, stop="lo")
    (out,), to_abort = engine.step(("a", "hello", "length"))
    completion = out.outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("hel", "stop", "lo")
    assert to_abort == []  # the core has finished it already


def test_final_only_with_stop_string(engine):
    engine.add("a", FINAL_ONLY, stop="lo", include_stop_str_in_output=True)
    assert engine.step(("a", "hel")) == ([], [])
    (out,), to_abort = engine.step(("a", "o there"))
    assert (out.outputs[0].text, len(out.outputs[0].token_ids), to_abort) == ("helo", 4, ["a"])


def test_n_final_only(engine):
    engine.add("a", FINAL_ONLY, n=3)
    assert engine.processor.num_unfinished == 1
    assert engine.step(("2_a", "z", "length"), ("0_a", "x")) == ([], [])
    assert engine.step(("1_a", "y", "length")) == ([], [])
    (out,), _ = engine.step(("0_a", "x", "stop"))
    assert [(c.index, c.text, c.finish_reason) for c in out.outputs] == [
        (0, "x", "stop"),
        (1, "y", "length"),
        (2, "z", "length"),
    ]
    assert (out.request_id, out.finished, engine.processor.num_unfinished) == ("a", True, 0)


@pytest.mark.parametrize("kind", [CUMULATIVE, DELTA])
def test_n_streaming(engine, kind):
    engine.add("a", kind, n=2)
    outputs, _ = engine.step(("0_a", "x"), ("1_a", "y"))
    assert [(o.request_id, o.outputs[0].index, o.outputs[0].text) for o in outputs] == [("a", 0, "x"), ("a", 1, "y")]
    outputs, _ = engine.step(("0_a", "x", "length"), ("1_a", "y"))
    assert [(o.outputs[0].finish_reason, o.finished) for o in outputs] == [("length", False), (None, False)]
    (out,), _ = engine.step(("1_a", "y", "length"))
    assert (out.outputs[0].text, out.finished) == ("yyy" if kind is CUMULATIVE else "y", True)


def test_intervals_are_each_completions_own(engine):
    engine.add("a", DELTA, n=2, stream_interval=3)
    shown = []
    for step in (
        ("0_a", "u"),
        ("1_a", "v"),
        ("0_a", "u"),
        ("0_a", "u"),
        ("1_a", "vvv"),
        ("0_a", "u"),
        ("1_a", "v", "stop"),
    ):
        outputs, _ = engine.step(step)
        shown += [(o.outputs[0].index, o.outputs[0].text, o.finished) for o in outputs]
    assert shown == [(0, "u", False), (1, "v", False), (1, "vvv", False), (0, "uuu", False), (1, "", False)]
    (last,), _ = engine.step(("0_a", "u", "length"))
    assert (last.outputs[0].text, last.outputs[0].index, last.finished) == ("u", 0, True)


def test_a_repetition_keeps_its_last_token_unless_it_completes_a_stop_string(engine):
    engine.add("a", DELTA)
    engine.add("b", DELTA, stop="yz")
    outputs, to_abort = engine.step(*((name, "xyz", "repetition", "repetition_detected") for name in "ab"))
    completions = [o.outputs[0] for o in outputs]
    assert [(c.text, c.finish_reason, c.stop_reason) for c in completions] == [
        ("xyz", "repetition", "repetition_detected"),
        ("x", "stop", "yz"),
    ]
    assert to_abort == []


def test_one_completion_of_several_meets_its_stop_string(engine):
    engine.add("a", FINAL_ONLY, n=2, stop="x")
    assert engine.step(("0_a", "ax"), ("1_a", "b")) == ([], ["0_a"])
    (out,), _ = engine.step(("1_a", "b", "length"))
    assert [(c.text, c.stop_reason) for c in out.outputs] == [("a", "x"), ("bb", None)]


def test_abort(engine):
    engine.add("a", n=2)
    engine.add("b")
    engine.step(("0_a", "x", "length"))
    assert engine.processor.has_request("1_a")
    assert engine.processor.abort(["a", "unknown"]) == ["1_a"]
    assert engine.step(("1_a", "late")) == ([], [])
    assert (engine.processor.has_request("a"), engine.processor.has_request("1_a")) == (False, False)
    assert engine.processor.num_unfinished == 1
    assert engine.processor.abort(["a"]) == []
    engine.add("a")  # the id is free again
    (out,), _ = engine.step(("a", "new"))
    assert out.outputs[0].text == "new"


def test_error(engine):
    engine.add("a", FINAL_ONLY)
    engine.step(("a", "part"))
    (out,), to_abort = engine.processor.process([EngineOutput("a", [], "error", error="the device failed")])
    completion = out.outputs[0]
    assert (completion.text, completion.finish_reason, completion.error) == ("part", "error", "the device failed")
    assert (out.finished, to_abort) == (True, [])


def test_outputs_do_not_change_afterwards(engine):
    engine.add("a")
    (first,), _ = engine.step(("a", "x"))
    engine.step(("a", "y"))
    assert len(first.outputs[0].token_ids) == 1


def test_without_tokenizer():
    engine = Engine(None)
    engine.add("a")
    (out,), _ = engine.step(("a", [5], "length"))
    assert (out.outputs[0].text, out.outputs[0].token_ids, out.metrics) == ("", [5], None)


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_metrics(tokenizer, kind):
    now = [12.0]
    recorder = MetricsRecorder(64, CacheConfig(), clock=lambda: now[0])
    engine = Engine(tokenizer, recorder=recorder)
    processed = request("a", kind)
    recorder.queue(processed)
    engine.processor.add_request(processed)
    now[0] = 13.0
    engine.step(("a", "xy"))
    now[0] = 15.0
    (out,), _ = engine.step(("a", "z", "length"))
    metrics = out.metrics
    assert metrics is not None
    assert (metrics.queued_ts, metrics.first_token_ts, metrics.last_token_ts) == (12.0, 13.0, 15.0)
    assert (metrics.finished_ts, metrics.e2e_latency) == (15.0, 5.0)
    assert (metrics.num_generation_tokens, metrics.first_token_latency) == (3, 3.0)
    assert metrics.arrival_time > 1e9  # since the epoch
