"""What crosses between an engine core and a client in another process arrives as it was."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest

from vjax.engine import protocol
from vjax.engine.progress import ProgressReceiver, ProgressSender
from vjax.engine.protocol import AbortRequests, AddRequests, Call, Failed, Outputs, Reply, Stop, decode, encode
from vjax.errors import ConfigError, OutOfMemoryError
from vjax.messages import EngineOutput, EngineRequest
from vjax.outputs import RequestMetrics
from vjax.sampling_params import RequestOutputKind, SamplingParams
from vjax.scheduler.stats import SchedulerStats


def crossed(message):
    return decode(encode(message))


def request(request_id: str = "r", *, metrics: bool = False, **params) -> EngineRequest:
    return EngineRequest(
        request_id, [1, 2**17, 3], SamplingParams(**params), 5, 12.5, -3, "salt", RequestMetrics() if metrics else None
    )


def test_requests():
    sent = request(
        temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, seed=7, stop_token_ids=[3, 4], max_tokens=None, ignore_eos=True,
        min_tokens=2,
    )  # fmt: skip
    sent.sampling_params.seed = -1  # of a child of n > 1, which the constructor would take for None
    sent.sampling_params.logit_bias = {7: (1, np.arange(3))}  # of types that MessagePack does not keep
    sent.processor_values = (1.0, 0.25)
    sent.grammar = 'start: "a"'
    (got,) = crossed(AddRequests([sent])).requests
    array = got.sampling_params.logit_bias.pop(7)[1]
    assert array.tolist() == [0, 1, 2] and type(array) is np.ndarray
    sent.sampling_params.logit_bias = {}
    assert got == sent
    assert crossed(AddRequests([request(metrics=True)])).requests[0].metrics == RequestMetrics()


def test_parameters_of_the_text_stay():
    sent = request(
        stop=["x"], detokenize=True, skip_special_tokens=False, spaces_between_special_tokens=False,
        include_stop_str_in_output=True, output_kind=RequestOutputKind.DELTA, extra_args={"a": 1},
        structured_outputs={"regex": "a"},
    )  # fmt: skip
    (got,) = crossed(AddRequests([sent])).requests
    assert got.sampling_params == SamplingParams()
    assert {f.name for f in dataclasses.fields(SamplingParams)} >= protocol.FRONT_PARAMS


def test_every_field_of_a_request_crosses():
    """A new field of `EngineRequest` needs its place in the protocol."""
    assert set(protocol._WireRequest.__struct_fields__) == {f.name for f in dataclasses.fields(EngineRequest)}


def test_outputs():
    outputs = [
        EngineOutput("a", [1, 2]),
        EngineOutput("b", [], "stop", 7, 32),
        EngineOutput("c", [9], "stop", "text", 0),
        EngineOutput("d", [], "error", None, 0, "why"),
    ]
    sent = Outputs(outputs, SchedulerStats(num_running=3, kv_cache_usage=0.5), {"a": (1.5, 16, 2)})
    got = crossed(sent)
    assert (got.outputs, got.stats, got.progress) == (outputs, sent.stats, {"a": (1.5, 16, 2)})
    assert len(encode(Outputs([EngineOutput("12:abc", [50_000])]))) < 25


def test_pooling():
    sent = dataclasses.replace(request(), pooling_type="MEAN")
    assert crossed(AddRequests([sent])).requests == [sent]
    states = np.arange(6, dtype=np.float32).reshape(2, 3)
    (got,) = crossed(Outputs([EngineOutput("e", [], "stop", pooled=states)])).outputs
    assert got.pooled.dtype == np.float32 and got.pooled.tolist() == states.tolist()


def test_commands():
    assert crossed(AbortRequests(["a", "b"])).request_ids == ["a", "b"]
    call = Call(3, "method", (1, "x", {"k": (2,)}))
    assert crossed(call) == call
    assert crossed(Stop()) == Stop()
    assert crossed(Reply(4, {"a": 1.5})) == Reply(4, {"a": 1.5})


class _Local(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (OutOfMemoryError("too much", parameter="x", value=3), OutOfMemoryError, "too much"),
        (ConfigError("value that cannot cross", value=lambda: 0), ConfigError, "value that cannot cross"),
        (FileNotFoundError(2, "No such file", "/x"), FileNotFoundError, "[Errno 2] No such file: '/x'"),
        (_Local(1, 2), RuntimeError, "_Local: 1 and 2"),
        (KeyboardInterrupt(), RuntimeError, "KeyboardInterrupt: "),
    ],
)
def test_exceptions(error, kind, text):
    for got in (crossed(Failed(error, "trace")).error, crossed(Reply(0, error=error)).error):
        assert type(got) is kind and str(got) == text
    if kind is OutOfMemoryError:
        assert (got.parameter, got.value) == ("x", 3)


def test_progress_is_sent_when_it_changes():
    at_core, at_front = request("a", metrics=True), request("a", metrics=True)
    sender, receiver = ProgressSender(), ProgressReceiver()
    sender.add([at_core, request("without")])
    receiver.add([at_front])

    def step(reason=None) -> dict:
        message = Outputs([EngineOutput("a", [1], reason), EngineOutput("without", [1])])
        sender.attach(message)
        receiver.apply(copy.copy(message))
        assert pickle.dumps(at_front.metrics) == pickle.dumps(at_core.metrics)
        return message.progress

    at_core.metrics.scheduled_ts, at_core.metrics.num_cached_tokens = 3.5, 16
    assert step() == {"a": (3.5, 16, 0)}
    assert step() == {}
    at_core.metrics.num_preemptions = 2
    assert step("length") == {"a": (3.5, 16, 2)}
    assert not (sender._requests or sender._sent or receiver._requests)
