"""The engine as a user steps it: requests in, `RequestOutput`s out. One implementation for V0 and V1.

add_request -> InputProcessor -> EngineCore -> OutputProcessor -> step's return value

The core is in this process, or a `ProcessCore` stands for one in another.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from vjax import envs
from vjax.config.engine_args import EngineArgs
from vjax.config.engine_config import EngineConfig
from vjax.config.pooler import Pooling
from vjax.engine import heap
from vjax.engine.builder import build_engine
from vjax.engine.core import EngineCore
from vjax.engine.input_processor import InputProcessor
from vjax.engine.interrupt import DeferInterrupt
from vjax.engine.pooling_outputs import make_output_processor
from vjax.engine.process_core import ProcessCore
from vjax.engine.recorder import MetricsRecorder
from vjax.engine.remote import OnModel, check_sleep, check_tags, remote_function, weight_update
from vjax.errors import EngineAsleepError, VjaxValidationError
from vjax.log import logger
from vjax.metrics import Metric
from vjax.outputs import StepRecord
from vjax.pooling_params import PoolingParams
from vjax.sampling_params import SamplingParams
from vjax.scheduler.recording import StepRecording
from vjax.text.tokenizer import Tokenizer

log = logger(__name__)


class BaseLLMEngine:
    """An engine in the mode that `args.use_v1` says (None: the mode of the class, else of the environment).

    Raises:
        ConfigError, ModelLoadError, OutOfMemoryError: All ValueErrors; see `build_engine`.
    """

    #: The mode of the class; None leaves it to the arguments and the environment.
    use_v1: bool | None = None

    def __init__(self, args: EngineArgs):
        if args.use_v1 is None and self.use_v1 is not None:
            args = dataclasses.replace(args, use_v1=self.use_v1)
        self._is_shut_down = False
        self._core: EngineCore | ProcessCore
        self.tokenizer: Tokenizer | None
        if envs.enable_multiprocessing(default=False):
            self._core = ProcessCore(args)
            info, self.tokenizer, grammars = self._core.info, self._core.tokenizer, None
        else:
            built = build_engine(args)
            self._core = built.core
            info, self.tokenizer, grammars = built.info, built.tokenizer, built.core.grammars
        self.config: EngineConfig = info.config
        #: Token ids are below it.
        self.vocab_size: int = info.vocab_size
        self._inputs = InputProcessor(
            info.config,
            vocab_size=self.vocab_size,
            tokenizer=self.tokenizer,
            eos_token_ids=info.eos_token_ids,
            grammars=grammars,
        )
        self._recorder: MetricsRecorder | None = None
        if not args.disable_log_stats:
            self._recorder = MetricsRecorder(info.config.model.max_model_len, info.config.cache)
        self._outputs = make_output_processor(info.config, self.tokenizer, self._recorder)
        self._undelivered: list[Any] = []
        heap.freeze(self)

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> BaseLLMEngine:
        return cls(args)

    # ---- requests -----------------------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt: str | Mapping[str, Any] | Sequence[int],
        params: SamplingParams | PoolingParams,
        arrival_time: float | None = None,
        *,
        priority: int = 0,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Accepts one prompt; `step` will deliver its outputs under `request_id`.

        Args:
            request_id: Unique among unfinished requests.
            prompt: Text, token ids, or a mapping with "prompt" or "prompt_token_ids" and optionally "cache_salt".
            params: Sampling parameters, where n > 1 becomes n sequences that share the prompt's KV; or pooling
                parameters, for a model that pools.
            arrival_time: Seconds, `time.monotonic` by default.
            priority: Lower runs first under scheduling_policy="priority".
            tokenization_kwargs: How the prompt becomes token ids, and at most how many; see `TokenizationParams`.

        Raises:
            VjaxValidationError: The request can never run; nothing of it stays behind.
        """
        self._check_running()
        if self._outputs.has_request(request_id):
            raise VjaxValidationError(
                f"request_id {request_id!r} is in use by an unfinished request; choose another or abort that one.",
                parameter="request_id",
                value=request_id,
            )
        if arrival_time is None:
            arrival_time = time.monotonic()
        process: Any = self._inputs.process_pooling if isinstance(params, PoolingParams) else self._inputs.process
        processed = process(
            request_id,
            prompt,
            params,
            priority=priority,
            arrival_time=arrival_time,
            tokenization_kwargs=tokenization_kwargs,
        )
        if self._recorder is not None:
            self._recorder.queue(processed)
        added: list[str] = []
        try:
            for request in processed.requests:
                self._core.add_request(request)
                added.append(request.request_id)
        except VjaxValidationError:
            self._core.abort_requests(added)
            raise
        self._outputs.add_request(processed)

    def abort_request(self, request_ids: str | Sequence[str]) -> None:
        """Ends requests; unknown and finished ids are ignored."""
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        self._core.abort_requests(self._outputs.abort(ids))

    def step(self) -> list[Any]:
        """One step of the engine.

        Returns:
            `RequestOutput`s, or `PoolingRequestOutput`s of an engine that pools: what is to be handed out now, as each
            request's output_kind asks; empty lists are normal.

        Raises:
            KeyboardInterrupt: Ctrl-C arrived; the engine is intact and the step's outputs come with the next call.
            EngineAsleepError: Requests wait for `wake_up`, and there is nothing to hand out.
        """
        self._check_running()
        try:
            with DeferInterrupt():
                self._undelivered += self._step()
        except EngineAsleepError:
            if not self._undelivered:
                raise
        outputs, self._undelivered = self._undelivered, []
        return outputs

    def put_back(self, outputs: Sequence[Any]) -> None:
        """Outputs that the caller of `step` has no use for: the next call returns them again, first."""
        self._undelivered += outputs

    def has_request(self, request_id: str) -> bool:
        """Whether the id belongs to an unfinished request."""
        return self._outputs.has_request(request_id)

    def _step(self) -> Sequence[Any]:
        core_outputs = self._core.step()
        request_outputs, to_abort = self._outputs.process(core_outputs)
        if to_abort:
            self._core.abort_requests(to_abort)
        if self._recorder is not None:
            self._recorder.record_step(self._core.latest_stats())
        return request_outputs

    def has_unfinished_requests(self) -> bool:
        return bool(self._undelivered) or self._core.has_unfinished_requests

    def get_num_unfinished_requests(self) -> int:
        return self._outputs.num_unfinished

    # ---- the rest -----------------------------------------------------------------------------------------------

    def get_tokenizer(self) -> Tokenizer:
        """Raises: VjaxValidationError when the engine was built with skip_tokenizer_init=True."""
        if self.tokenizer is None:
            raise VjaxValidationError("There is no tokenizer: the engine was created with skip_tokenizer_init=True.")
        return self.tokenizer

    def get_metrics(self) -> list[Metric]:
        """vLLM's series, under its names with the prefix "vjax:"; see `vjax.engine.recorder`.

        Raises:
            VjaxValidationError: The engine was created with disable_log_stats=True.
        """
        if self._recorder is None:
            raise VjaxValidationError("Metrics are off: create the engine with disable_log_stats=False.")
        return self._recorder.snapshot(self._core.stats())

    @contextmanager
    def record_steps(self, *, blocks: bool = True) -> Iterator[list[StepRecord]]:
        """A list to which every step that is scheduled inside the `with` adds its record; `vjax.plot` draws it.

            with llm.llm_engine.record_steps() as steps:
                llm.generate(prompts)

        Args:
            blocks: False leaves block tables and cached blocks empty: enough to count tokens and requests, and cheap.

        Raises:
            VjaxValidationError: The scheduler, whose books are read, is in another process.
        """
        if isinstance(self._core, ProcessCore):
            raise VjaxValidationError(
                "record_steps needs the engine core in this process; set VJAX_ENABLE_V1_MULTIPROCESSING=0."
            )
        recording = StepRecording(blocks=blocks)
        recordings = self._core.scheduler.recordings
        recordings.append(recording)
        try:
            yield recording.steps
        finally:
            recordings.remove(recording)

    def tokenize(
        self, prompt: str | Mapping[str, Any] | Sequence[int], tokenization_kwargs: Mapping[str, Any] | None = None
    ) -> tuple[list[int], str | None]:
        """Token ids and cache salt (None: none) of a prompt as `add_request` takes it.

        Raises:
            VjaxValidationError: `add_request` would refuse the prompt.
        """
        return self._inputs.tokenize(prompt, tokenization_kwargs)

    def check_pooling(self, params: PoolingParams) -> Pooling:
        """How the engine pools.

        Raises:
            VjaxValidationError: It generates, or `params` are no PoolingParams.
        """
        return self._inputs.pooling(params)

    def tokenize_pair(
        self, text: str, pair: str, params: PoolingParams, tokenization_kwargs: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of two texts in one prompt, for a model that scores pairs.

        Raises:
            VjaxValidationError: There is no tokenizer, or one of the two is no text.
        """
        return self._inputs.tokenize_pair(text, pair, params, tokenization_kwargs)

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a request unless ignore_eos is set."""
        return self._inputs.eos_token_id

    def get_default_sampling_params(self) -> SamplingParams:
        """vLLM's defaults, overridden by the model's generation_config.json."""
        return self._inputs.default_sampling_params()

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forgets all cached prefixes; False (with a warning) while requests hold blocks.

        Args:
            reset_running_requests: Running requests give their blocks back first, and are computed again.
        """
        self._check_running()
        done = self._core.reset_prefix_cache(reset_running_requests)
        if not done:
            log.warning("the prefix cache was not reset: unfinished requests hold blocks; finish or abort them first")
        return done

    # ---- control ------------------------------------------------------------------------------------------------

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Stops and gives memory back until `wake_up`; as `LLM.sleep`. With "abort" and "wait" the last outputs of
        requests come with the next `step`."""
        self._check_running()
        check_sleep(level, mode)
        if mode == "abort":
            with DeferInterrupt():
                ended = self._outputs.abort_outputs(self._outputs.request_ids())
                self._core.abort_requests([output.request_id for output in ended])
                self._undelivered += self._outputs.process(ended)[0]
        done = self._core.sleep(level, mode == "wait")
        while not done.done():
            with DeferInterrupt():
                self._undelivered += self._step()
        done.result()

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Ends the sleep; as `LLM.wake_up`."""
        self._check_running()
        self._core.call("wake_up", check_tags(tags))

    def is_sleeping(self) -> bool:
        """Asleep at any level, in part as well."""
        self._check_running()
        return self._core.call("is_sleeping")

    def update_weights(self, params: Mapping[str, Any] | Sequence[Any], *, partial: bool = False) -> None:
        """New weights in place; as `LLM.update_weights`."""
        self._check_running()
        with DeferInterrupt():
            calls = weight_update(params, partial=partial, to_host=isinstance(self._core, ProcessCore))
            try:
                method, arguments = next(calls)
                while True:
                    method, arguments = calls.send(self._core.call(method, *arguments))
            except StopIteration:
                return
            except BaseException:
                self._core.call("abandon_weight_update")
                raise

    def get_weights(self, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Copies of the leaves; as `LLM.get_weights`."""
        self._check_running()
        wanted = self._core.call("weight_names") if names is None else names
        return {name: self._core.call("get_weight", name) for name in wanted}

    def collective_rpc(
        self, method: str | Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """A call of the engine's runner; as `LLM.collective_rpc`."""
        self._check_running()
        in_process = not isinstance(self._core, ProcessCore)
        name, arguments = remote_function(method, args, kwargs, in_process=in_process)
        return [self._core.call(name, *arguments)]

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        """A call with the model; as `LLM.apply_model`."""
        return self.collective_rpc(OnModel(func))

    def start_profile(self, profile_prefix: str | None = None) -> None:
        """Begins a trace; as `LLM.start_profile`."""
        self._check_running()
        self._core.call("start_profile", profile_prefix)

    def stop_profile(self) -> None:
        """Ends and writes the trace."""
        self._check_running()
        self._core.call("stop_profile")

    # ---- for measurements ---------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Compiles and runs everything that any step may need, so that serving never waits for the compiler. To be
        called while nothing runs."""
        self._core.warm_up()

    def least_bytes_read(self, num_keys: int) -> dict[str, int]:
        """What a decode step over num_keys keys in all has to read: bytes of "weights" and of the "KV cache"."""
        return self._core.least_bytes_read(num_keys)

    @property
    def num_compilations_while_serving(self) -> int:
        """Compilations that a step had to wait for."""
        return self._core.num_compilations_while_serving()

    def shutdown(self) -> None:
        """Frees the device arrays; dropping the last reference does the same. The engine cannot be used afterwards."""
        self._is_shut_down = True
        self._core.shutdown()

    def __del__(self) -> None:
        if "_core" in self.__dict__:  # otherwise it was never built
            self.shutdown()

    def _check_running(self) -> None:
        if self._is_shut_down:
            raise RuntimeError("The engine was shut down; create a new one.")
