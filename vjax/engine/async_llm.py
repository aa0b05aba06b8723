"""`AsyncLLM`: many callers at once, each an asynchronous iterator over its own request's outputs.

    generate -> InputProcessor -> EngineClient ==> EngineCore, in a process or thread of its own
    generate <- OutputCollector <- OutputProcessor <== its outputs

Text is made here, in the client's thread; one lock guards the tables of unfinished requests. Callers may live in any
number of event loops.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vjax import envs
from vjax.beam_search import BeamSearch, BeamSearchOutput, check_beam_search
from vjax.config.engine_args import EngineArgs
from vjax.config.engine_config import EngineConfig, ModelConfig
from vjax.engine import heap
from vjax.engine.async_control import AsyncControl
from vjax.engine.batch_args import Prompt, check_other_arguments
from vjax.engine.client import EngineClient, ThreadClient, again, shut_down_error
from vjax.engine.collector import OutputCollector, wake
from vjax.engine.input_processor import InputProcessor, ProcessedRequest, check_request_id
from vjax.engine.pooling import ProcessedPooling
from vjax.engine.pooling_outputs import make_output_processor
from vjax.engine.process_client import start_process
from vjax.engine.protocol import Outputs
from vjax.engine.recorder import MetricsRecorder
from vjax.errors import EngineDeadError, VjaxValidationError
from vjax.log import logger
from vjax.metrics import Metric
from vjax.outputs import PoolingOutput, PoolingRequestOutput, RequestOutput
from vjax.pooling_params import PoolingParams
from vjax.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from vjax.text.tokenizer import Tokenizer

log = logger(__name__)

#: Texts of more characters are tokenised in a thread: the event loop goes on meanwhile.
_LONG_TEXT = 20_000


@dataclass(slots=True)
class _Search:
    """A beam search that is under way."""

    #: Request ids of the beams of its step.
    beam_ids: list[str] = field(default_factory=list)
    is_aborted: bool = False


class AsyncLLM(AsyncControl):
    """An engine that serves concurrent callers.

    Args:
        args: Engine arguments. A mode that they leave open is the environment's.
        multiprocess: True: the engine core gets a process of its own, so that this one's Python never delays a step.
            False: a thread of this process. None: what VJAX_ENABLE_V1_MULTIPROCESSING says, else True.

    Raises:
        ConfigError, ModelLoadError, OutOfMemoryError: All ValueErrors that say what was got and what to do; the same
            ones from a process as from a thread.
        EngineDeadError: The process ended while it started, without a word.

    Use it as a context manager, or call `shutdown`, or drop the last reference, to end the engine.
    """

    def __init__(self, args: EngineArgs, *, multiprocess: bool | None = None):
        if multiprocess is None:
            multiprocess = envs.enable_multiprocessing(default=True)
        #: Guards everything below that is not set here once and for all.
        self._lock = threading.Lock()
        self._collectors: dict[str, OutputCollector] = {}
        #: By the ids that their callers gave them.
        self._searches: dict[str, _Search] = {}
        self._dead: EngineDeadError | None = None
        self._is_shut_down = False
        self._numbers = itertools.count()
        self._client: EngineClient
        self.tokenizer: Tokenizer | None
        grammars = None
        if multiprocess:
            self._client, self.tokenizer = start_process(args, self._take_outputs, self._engine_died)
        else:
            from vjax.engine.builder import build_engine

            built = build_engine(args)
            self._client = ThreadClient(built.core, built.info, self._take_outputs, self._engine_died)
            self.tokenizer, grammars = built.tokenizer, built.core.grammars
        info = self._client.info
        self.config: EngineConfig = info.config
        #: Token ids are below it.
        self.vocab_size: int = info.vocab_size
        self._inputs = InputProcessor(
            info.config,
            vocab_size=info.vocab_size,
            tokenizer=self.tokenizer,
            eos_token_ids=info.eos_token_ids,
            grammars=grammars,
        )
        self._recorder: MetricsRecorder | None = None
        if not info.config.disable_log_stats:
            self._recorder = MetricsRecorder(info.config.model.max_model_len, info.config.cache)
        self._outputs = make_output_processor(info.config, self.tokenizer, self._recorder)
        self._finalizer = weakref.finalize(self, self._client.shutdown)
        heap.freeze(self)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, *, multiprocess: bool | None = None) -> AsyncLLM:
        """An engine from its arguments, `AsyncEngineArgs` as a rule."""
        return cls(engine_args, multiprocess=multiprocess)

    # ---- requests -----------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Completes one prompt; iterate over the result. The request begins with the first iteration, and a caller
        that stops iterating, by `break` or because its task is cancelled, aborts it.

        Outputs are as `sampling_params.output_kind` says. Those that come while the caller is busy arrive as one: a
        delta then holds several tokens, and with n > 1 several completions.

        Args:
            prompt: Text, token ids, or a mapping with "prompt" or "prompt_token_ids" and optionally "cache_salt".
            request_id: Unique among unfinished requests.
            priority: Lower runs first under scheduling_policy="priority".
            tokenization_kwargs: How the prompt becomes token ids, and at most how many; see `TokenizationParams`.
            others: vLLM's further keywords, such as lora_request: accepted while they ask for nothing.

        Yields:
            Outputs, of which the last has `finished`; after `abort` its finish_reason is "abort".

        Raises:
            VjaxValidationError: The request can never run, or its id is in use; nothing of it stays behind.
            EngineDeadError: The engine has ended, or ended meanwhile.
        """
        check_other_arguments("generate", others, "AsyncLLM")
        arrival_time = time.monotonic()
        self._check_alive()
        process = functools.partial(
            self._inputs.process,
            request_id,
            prompt,
            sampling_params,
            priority=priority,
            arrival_time=arrival_time,
            tokenization_kwargs=tokenization_kwargs,
        )
        # A grammar may take a second to compile.
        slow = _is_long(prompt) or getattr(sampling_params, "structured_outputs", None) is not None
        processed = await asyncio.to_thread(process) if slow else process()
        (collector,) = self._add([processed])
        finished = False
        try:
            while not finished:
                output = await collector.get()
                finished = output.finished
                yield output
        finally:
            if not finished:
                self._drop(request_id, collector)

    async def encode(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams,
        request_id: str,
        *,
        priority: int = 0,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> AsyncGenerator[PoolingRequestOutput[PoolingOutput], None]:
        """What a model that pools makes of one prompt; iterate over the result, which is one output. A caller whose
        task is cancelled aborts it.

        Args:
            pooling_params: Its task, None for what the model is made for, decides what the output's `data` are, as
                `pooling_task` of `LLM.encode` does.
            The rest: as `generate`.

        Raises:
            VjaxValidationError: The request can never run, its id is in use, or the engine generates.
            EngineDeadError: The engine has ended, or ended meanwhile.
        """
        check_other_arguments("encode", others, "AsyncLLM")
        arrival_time = time.monotonic()
        self._check_alive()
        process = functools.partial(
            self._inputs.process_pooling,
            request_id,
            prompt,
            pooling_params,
            priority=priority,
            arrival_time=arrival_time,
            tokenization_kwargs=tokenization_kwargs,
        )
        processed = await asyncio.to_thread(process) if _is_long(prompt) else process()
        (collector,) = self._add([processed])
        try:
            output = await collector.get()
        except BaseException:
            self._drop(request_id, collector)
            raise
        yield output

    async def beam_search(
        self,
        prompt: Prompt,
        request_id: str,
        params: BeamSearchParams,
        *,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> BeamSearchOutput:
        """The most probable continuations of one prompt, as `LLM.beam_search` finds them. Each step is a batch of its
        beams, a token each, among the requests of other callers.

        A caller whose task is cancelled ends the search. `abort` ends it with what it has: the finish_reason of its
        unfinished sequences is "abort".

        Args:
            request_id: Unique among unfinished requests. Those of the beams are made from it.
            tokenization_kwargs, others: As `generate`.

        Raises:
            VjaxValidationError: The prompt is invalid, the id is in use, or the engine's logprobs_mode or max_logprobs
                do not permit the search.
            EngineDeadError: The engine has ended, or ended meanwhile.
        """
        check_other_arguments("beam_search", others, "AsyncLLM")
        self._check_alive()
        check_beam_search(params, self.config.model)
        check_request_id(request_id)
        tokenize = functools.partial(self._inputs.tokenize, prompt, tokenization_kwargs)
        token_ids, salt = await asyncio.to_thread(tokenize) if _is_long(prompt) else tokenize()
        search = BeamSearch(token_ids, params, self._inputs.eos_token_id, self.config.model.max_model_len)
        with self._lock:
            self._check_unused(request_id)
            record = self._searches[request_id] = _Search()
        try:
            while search.beams:
                prompts = [{"prompt_token_ids": beam.tokens, "cache_salt": salt} for beam in search.beams]
                outputs = await self._run_beams(request_id, record, prompts, search.request_params)
                if record.is_aborted:
                    search.end("abort")
                else:
                    search.take([output.outputs[0] for output in outputs])
        finally:
            with self._lock:
                del self._searches[request_id]
        return search.output(None if self.tokenizer is None else self.tokenizer.decode)

    async def _run_beams(
        self, request_id: str, record: _Search, prompts: Sequence[Prompt], params: SamplingParams
    ) -> list[RequestOutput]:
        """The one output of each of the requests of a step, or an end of all of them."""
        arrival_time = time.monotonic()
        record.beam_ids = [f"beam_search-{request_id}-{i}" for i in range(len(prompts))]
        collectors = self._add(
            [
                self._inputs.process(beam_id, prompt, params, arrival_time=arrival_time)
                for beam_id, prompt in zip(record.beam_ids, prompts, strict=True)
            ]
        )
        try:
            return [await collector.get() for collector in collectors]
        finally:
            for beam_id, collector in zip(record.beam_ids, collectors, strict=True):
                self._drop(beam_id, collector)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Ends requests and beam searches. Their callers get a last output with what there is, finish_reason "abort".
        Unknown and finished ids are ignored."""
        given = [request_id] if isinstance(request_id, str) else list(request_id)
        request_ids: list[str] = []
        with self._lock:
            for each in given:
                if (search := self._searches.get(each)) is not None:
                    search.is_aborted = True
                    request_ids += search.beam_ids
                else:
                    request_ids.append(each)
            ended = self._outputs.abort_outputs(request_ids)
            core_ids = [output.request_id for output in ended]
            shown, _ = self._outputs.process(ended)
            waiters = self._deliver(shown)
        self._client.abort_requests(core_ids)
        self._wake(waiters)

    async def _abort_all(self) -> None:
        await self.abort([*self._collectors, *self._searches])

    def _add(self, batch: Sequence[ProcessedRequest | ProcessedPooling]) -> list[OutputCollector]:
        """Adds all requests, or none."""
        loop = asyncio.get_running_loop()
        collectors: list[OutputCollector] = []
        for processed in batch:
            for request in processed.requests:
                # Outputs of an aborted request, which may still be on the way, are not those of a later one of its id.
                request.request_id = f"{next(self._numbers)}:{request.request_id}"
            delta = getattr(processed.params, "output_kind", None) is RequestOutputKind.DELTA
            collectors.append(OutputCollector(loop, delta=delta))
        with self._lock:
            self._check_alive()
            for processed in batch:
                self._check_unused(processed.request_id)
            if self._recorder is not None:
                for processed in batch:
                    self._recorder.queue(processed)
            self._client.add_requests([request for processed in batch for request in processed.requests])
            for processed, collector in zip(batch, collectors, strict=True):
                self._outputs.add_request(processed)
                self._collectors[processed.request_id] = collector
        return collectors

    def _check_unused(self, request_id: str) -> None:
        """The lock is held."""
        if self._outputs.has_request(request_id) or request_id in self._searches:
            raise VjaxValidationError(
                f"request_id {request_id!r} is in use by an unfinished request; choose another or abort that one.",
                parameter="request_id",
                value=request_id,
            )

    def _drop(self, request_id: str, collector: OutputCollector) -> None:
        """Nobody waits for the request any more."""
        with self._lock:
            if self._collectors.get(request_id) is not collector:
                return  # finished, or lost with the engine
            del self._collectors[request_id]
            core_ids = self._outputs.abort([request_id])
        self._client.abort_requests(core_ids)

    def get_num_unfinished_requests(self) -> int:
        return len(self._collectors)

    # ---- from the client's thread -------------------------------------------------------------------------------

    def _take_outputs(self, message: Outputs) -> None:
        with self._lock:
            shown, to_abort = self._outputs.process(message.outputs)
            if self._recorder is not None and message.stats is not None:
                self._recorder.record_step(message.stats)
            waiters = self._deliver(shown)
        self._client.abort_requests(to_abort)
        self._wake(waiters)

    def _engine_died(self, error: EngineDeadError) -> None:
        with self._lock:
            self._dead = error
        self._fail_all(error)

    def _fail_all(self, error: EngineDeadError) -> None:
        """Every waiter gets the error, and every table is emptied."""
        waiters: _Waiters = {}
        with self._lock:
            collectors, self._collectors = self._collectors, {}
            self._outputs.abort(list(collectors))
            for collector in collectors.values():
                _put(waiters, collector, again(error))
        self._wake(waiters)

    def _deliver(self, outputs: Sequence[Any]) -> _Waiters:
        """Puts outputs where their callers find them; returns the callers that sleep. The lock is held."""
        waiters: _Waiters = {}
        for output in outputs:
            find = self._collectors.pop if output.finished else self._collectors.get
            collector = find(output.request_id, None)
            assert collector is not None, output.request_id
            _put(waiters, collector, output)
        return waiters

    def _wake(self, waiters: _Waiters) -> None:
        for loop, sleeping in waiters.items():
            try:
                loop.call_soon_threadsafe(wake, sleeping)
            except RuntimeError:  # the loop was closed, with its callers
                log.debug("an event loop was closed before the requests of its callers were finished")

    # ---- the rest -----------------------------------------------------------------------------------------------

    def get_tokenizer(self) -> Tokenizer:
        """Raises: VjaxValidationError when the engine was built with skip_tokenizer_init=True."""
        if self.tokenizer is None:
            raise VjaxValidationError("There is no tokenizer: the engine was created with skip_tokenizer_init=True.")
        return self.tokenizer

    @property
    def model_config(self) -> ModelConfig:
        """What the engine was told and found out of its model."""
        return self.config.model

    async def get_model_config(self) -> ModelConfig:
        """`model_config`, as vLLM's users ask for it."""
        return self.config.model

    def get_default_sampling_params(self) -> SamplingParams:
        """vLLM's defaults, overridden by the model's generation_config.json."""
        return self._inputs.default_sampling_params()

    async def get_metrics(self) -> list[Metric]:
        """As `LLM.get_metrics`.

        Raises:
            VjaxValidationError: The engine was created with disable_log_stats=True.
        """
        if self._recorder is None:
            raise VjaxValidationError("Metrics are off: create the engine with disable_log_stats=False.")
        stats = await self._call("stats")
        with self._lock:
            return self._recorder.snapshot(stats)

    async def check_health(self) -> None:
        """Raises: EngineDeadError when the engine has ended."""
        self._check_alive()

    @property
    def is_running(self) -> bool:
        """Requests are served."""
        return self._dead is None and not self._is_shut_down

    @property
    def is_stopped(self) -> bool:
        return not self.is_running

    @property
    def errored(self) -> bool:
        """The engine ended by itself: what vLLM's servers exit on."""
        return self._dead is not None

    @property
    def dead_error(self) -> EngineDeadError:
        """What every further request would get."""
        return again(self._dead or shut_down_error())

    def shutdown(self) -> None:
        """Ends the engine; whoever still waits gets an EngineDeadError. May be called more than once."""
        with self._lock:
            self._is_shut_down = True
        self._fail_all(shut_down_error())
        self._finalizer()

    def __enter__(self) -> AsyncLLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def _check_alive(self) -> None:
        if not self.is_running:
            raise self.dead_error


#: The name under which vLLM's users know it as well.
AsyncLLMEngine = AsyncLLM

#: Callers that sleep, by their event loops.
_Waiters = dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]]


def _put(waiters: _Waiters, collector: OutputCollector, output: Any) -> None:
    waiter = collector.put(output)
    if waiter is not None:
        waiters.setdefault(collector.loop, []).append(waiter)


def _is_long(prompt: Any) -> bool:
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    return isinstance(text, str) and len(text) > _LONG_TEXT
