"""What an engine core and its clients say to each other, and how that crosses to another process.

    client --AddRequests, AbortRequests, Call, Stop--> core <--Wake-- its own threads
    client <--Ready, Outputs, Reply, Failed----------- core

Requests, aborts and outputs, of which there are some in every step, are MessagePack arrays without field names; all
else is a pickle. Both ends are one program on one machine, and their sockets lie in a folder that only their user can
enter.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
from dataclasses import dataclass
from typing import Any

import msgspec

from vjax.config.engine_config import EngineConfig
from vjax.errors import VjaxValidationError
from vjax.messages import EngineOutput, EngineRequest
from vjax.outputs import RequestMetrics
from vjax.sampling_params import SamplingParams
from vjax.scheduler.stats import SchedulerStats

#: When a request was first scheduled (monotonic seconds), its cached tokens then, and its preemptions so far.
Progress = tuple[float, int, int]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a front end has to know of an engine core."""

    config: EngineConfig
    #: Token ids are below it.
    vocab_size: int
    #: Those of config.json.
    eos_token_ids: tuple[int, ...]


# ---- to the core --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class AddRequests:
    """They passed `check_request`, and their ids are not in use."""

    requests: list[EngineRequest]


class AbortRequests(msgspec.Struct, array_like=True, tag=1):
    """Unknown and finished ids are ignored."""

    request_ids: list[str]


@dataclass(slots=True)
class Call:
    """Calls a method of `EngineCore` between two steps; a `Reply` with the same id answers, when the method returns or
    when the future is done that it returned."""

    call_id: int
    method: str
    arguments: tuple[Any, ...]


@dataclass(slots=True)
class Stop:
    """The last message: unfinished requests are dropped."""


@dataclass(slots=True)
class Wake:
    """From a thread of the core to its loop: something is ready."""


Command = AddRequests | AbortRequests | Call | Stop | Wake

# ---- from the core ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Ready:
    """The first message of a core that could be built."""

    info: EngineInfo


class Outputs(msgspec.Struct, array_like=True, tag=2):
    """One step's."""

    outputs: list[EngineOutput]
    #: None with disable_log_stats.
    stats: SchedulerStats | None = None
    #: What became known of requests with `metrics`, which a client in the same process sees without it.
    progress: dict[str, Progress] = {}


@dataclass(slots=True)
class Reply:
    """Of a `Call`: what the method returned, or what it raised."""

    call_id: int
    value: Any = None
    error: BaseException | None = None


@dataclass(slots=True)
class Failed:
    """The last message of a core that could not be built, or that ended by an exception. `trace`: its traceback."""

    error: BaseException
    trace: str


Message = Ready | Outputs | Reply | Failed

# ---- as bytes -----------------------------------------------------------------------------------------------------


def encode(message: Command | Message) -> bytes:
    """The message for another process."""
    if isinstance(message, AddRequests):
        return _encoder.encode(_AddRequests([_to_wire(request) for request in message.requests]))
    if isinstance(message, (AbortRequests, Outputs)):
        return _encoder.encode(message)
    if isinstance(message, Failed):
        message = Failed(portable(message.error), message.trace)
    elif isinstance(message, Reply) and message.error is not None:
        message = Reply(message.call_id, error=portable(message.error))
    try:
        return _encoder.encode(_Pickled(pickle.dumps(message)))
    except Exception as e:
        if not isinstance(message, Reply):
            raise
        error = VjaxValidationError(f"The result cannot be sent to another process ({type(e).__name__}: {e}).")
        return _encoder.encode(_Pickled(pickle.dumps(Reply(message.call_id, error=error))))


def decode(data: bytes) -> Any:
    """The message that `encode` was given; requests come without the times that only their front end needs."""
    message = _decoder.decode(data)
    if isinstance(message, _AddRequests):
        return AddRequests([_from_wire(request) for request in message.requests])
    if isinstance(message, _Pickled):
        return pickle.loads(message.data)
    return message


def portable(error: BaseException) -> BaseException:
    """The exception as another process can read it: of the same type and text where that can be had."""
    if isinstance(error, Exception):
        if _survives(error):
            return error
        with contextlib.suppress(Exception):  # of its constructor, which may want other arguments
            bare = copy.copy(error)
            bare.__dict__ = {name: value for name, value in error.__dict__.items() if _survives(value)}
            if _survives(bare):
                return bare
    return RuntimeError(f"{type(error).__name__}: {error}")


def _survives(value: Any) -> bool:
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:  # whatever a user's class raises
        return False
    return True


class _WireRequest(msgspec.Struct, array_like=True, gc=False):
    """An `EngineRequest`, with those of its sampling parameters that the core needs and that are not the defaults."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: dict[str, Any]
    eos_token_id: int | None
    arrival_time: float
    priority: int
    cache_salt: str | None
    ignored_eos_token_ids: tuple[int, ...]
    bad_words_token_ids: tuple[tuple[int, ...], ...]
    processor_values: tuple[float, ...]
    grammar: str | None
    pooling_type: str | None
    #: Whether the scheduler has to note what becomes of it.
    metrics: bool


class _AddRequests(msgspec.Struct, array_like=True, tag=0):
    requests: list[_WireRequest]


class _Pickled(msgspec.Struct, array_like=True, tag=3):
    data: bytes


#: Sampling parameters of the text, which stays in the front end; of some the request has what the core needs.
FRONT_PARAMS = frozenset(
    {
        "bad_words",
        "detokenize",
        "extra_args",
        "flat_logprobs",
        "include_stop_str_in_output",
        "output_kind",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop",
        "stream_interval",
        "structured_outputs",
    }
)
_DEFAULT_PARAMS = SamplingParams()
_CORE_PARAMS = tuple(
    (field.name, getattr(_DEFAULT_PARAMS, field.name))
    for field in dataclasses.fields(SamplingParams)
    if field.name not in FRONT_PARAMS
)
_PICKLE = 1


def _to_wire(request: EngineRequest) -> _WireRequest:
    params = request.sampling_params
    return _WireRequest(
        request.request_id,
        request.prompt_token_ids,
        {name: _plain(v) for name, default in _CORE_PARAMS if (v := getattr(params, name)) != default},
        request.eos_token_id,
        request.arrival_time,
        request.priority,
        request.cache_salt,
        tuple(request.ignored_eos_token_ids),
        request.bad_words_token_ids,
        request.processor_values,
        request.grammar,
        request.pooling_type,
        request.metrics is not None,
    )


def _from_wire(request: _WireRequest) -> EngineRequest:
    # They were checked and completed by the front end: the constructor's checks are not for a child of n > 1.
    params = copy.copy(_DEFAULT_PARAMS)
    for name, value in request.sampling_params.items():
        setattr(params, name, value)
    return EngineRequest(
        request.request_id,
        request.prompt_token_ids,
        params,
        request.eos_token_id,
        request.arrival_time,
        request.priority,
        request.cache_salt,
        metrics=RequestMetrics() if request.metrics else None,
        ignored_eos_token_ids=request.ignored_eos_token_ids,
        bad_words_token_ids=request.bad_words_token_ids,
        processor_values=request.processor_values,
        grammar=request.grammar,
        pooling_type=request.pooling_type,
    )


def _plain(value: Any) -> Any:
    """A value that keeps its type on the way."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list and all(type(item) in (int, float, str) for item in value):
        return value
    return _pickled(value)


def _pickled(value: Any) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(_PICKLE, pickle.dumps(value))


def _unpickled(code: int, data: memoryview) -> Any:
    assert code == _PICKLE, code
    return pickle.loads(data)


_encoder = msgspec.msgpack.Encoder(enc_hook=_pickled)
_decoder = msgspec.msgpack.Decoder(
    _AddRequests | AbortRequests | Outputs | _Pickled, ext_hook=_unpickled, dec_hook=lambda _, value: value
)
