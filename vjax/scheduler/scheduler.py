"""The scheduler: which request computes how many tokens in each step, and what becomes of the tokens that come back.

Asynchronous scheduling needs nothing of its own here. `schedule` moves the counters of a request as if the step were
done, with placeholders for the tokens that it will sample, so it may be called again before `update`; tokens arrive
later, in the order of the steps. The three ways in which a step can be lost have a method each: `unschedule` (it was
never dispatched), `fail_step` (the device failed it), `reset_prefix_cache` (its tokens are not wanted any more).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from vjax.config.cache import CacheConfig
from vjax.config.scheduler import SchedulerConfig
from vjax.errors import VjaxValidationError
from vjax.messages import EngineOutput, EngineRequest, SchedulerOutput, StepLogprobs, StepOutput
from vjax.request import Request, RequestStatus
from vjax.scheduler.batching import BatchingPolicy
from vjax.scheduler.limits import check_request
from vjax.scheduler.recording import StepRecording
from vjax.scheduler.repetition import REPETITION_DETECTED, ends_in_repetition
from vjax.scheduler.state import SchedulerState
from vjax.scheduler.stats import SchedulerStats
from vjax.scheduler.step import InFlightStep, StepBuilder


class Scheduler:
    """Owns all requests and KV blocks of an engine. Not thread-safe: one thread calls it.

    Args:
        config: Limits and policy.
        cache: `num_gpu_blocks` must be known.
        policy: How steps are filled; `make_scheduler` picks it.
        clock: Monotonic seconds, of the times in `EngineRequest.metrics`.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheConfig,
        policy: BatchingPolicy,
        clock: Callable[[], float] = time.monotonic,
    ):
        budget, max_len = config.max_num_batched_tokens, config.max_model_len
        assert config.enable_chunked_prefill or budget >= max_len, "a whole prompt must fit into the budget"
        self._config = config
        self._policy = policy
        self._state = SchedulerState(config, cache, clock)
        self._next_step_id = 0
        self._num_added = 0
        #: Each of them gets every step as it is scheduled.
        self.recordings: list[StepRecording] = []

    # Requests in and out

    def add(self, request: EngineRequest, matcher: Any = None, *, blocked: bool = False) -> Request:
        """Queues a request.

        Args:
            matcher: Its `Request.matcher`.
            blocked: It has a grammar whose matcher is not ready, and waits outside of the queue until `unblock`.

        Raises:
            VjaxValidationError: The id is in use, or the request could not run even if it were alone.
        """
        self._validate(request)
        added = Request.from_engine_request(request, self._config.max_model_len, matcher)
        added.sequence_number = self._num_added
        self._num_added += 1
        self._state.requests[added.request_id] = added
        self._state.num_constrained += matcher is not None
        if blocked:
            added.status = RequestStatus.WAITING_FOR_GRAMMAR
            self._state.blocked.add(added)
        else:
            self._state.waiting.add(added)
        return added

    def unblock(self, request: Request, matcher: Any) -> None:
        """Queues a request that was added `blocked`, and lives."""
        self._state.unblock(request, matcher)

    def abort(self, request_ids: Iterable[str]) -> list[str]:
        """Ends requests at once and returns the ids that were alive; tokens still in flight for them are dropped."""
        aborted = []
        for request_id in request_ids:
            request = self._state.requests.get(request_id)
            if request is not None:
                self._state.finish(request, "abort")
                aborted.append(request_id)
        if aborted:
            self._state.drop_finished()
        return aborted

    def set_admission(self, admits: bool) -> None:
        """False: running requests go on, and no waiting one starts."""
        self._state.admits = admits

    def fail(self, request: Request, error: str) -> EngineOutput:
        """Ends one request, which lives, with finish_reason "error"; tokens still in flight for it are dropped."""
        self._state.finish(request, "error")
        self._state.drop_finished()
        return EngineOutput(request.request_id, [], "error", None, request.num_cached_tokens or 0, error)

    # Steps

    def schedule(self) -> SchedulerOutput:
        """The next step; `rows` is empty when there is nothing to do until a step in flight returns, or at all."""
        step = StepBuilder(self._config.max_num_batched_tokens)
        self._policy.fill(self._state, step)
        step_id = self._next_step_id
        if step.is_empty:
            return SchedulerOutput(step_id)
        self._next_step_id += 1
        scheduled, self._state.in_flight[step_id] = step.build(step_id)
        if self.recordings:
            self.cache_scheduled_blocks()
        for recording in self.recordings:
            recording.add(scheduled, self._state.in_flight[step_id].requests, self._state)
        return scheduled

    def cache_scheduled_blocks(self) -> None:
        """Registers the blocks that steps fill. To be called when the latest one is on its way to the device, which
        need not wait for it; whoever needs them earlier finds them."""
        self._state.kv.cache_noted_blocks()

    def update(self, scheduled: SchedulerOutput, output: StepOutput) -> list[EngineOutput]:
        """Hands the tokens of the oldest step in flight to their requests and ends those that are done.

        One output per request that got a token, in the order of the step; none for requests that have ended meanwhile.
        """
        state, step_id = self._state, scheduled.step_id
        assert next(iter(state.in_flight)) == step_id == output.step_id, "steps return in the order of execution"
        step = state.in_flight.pop(step_id)
        requests, block_size = step.sampling_requests(), state.kv.block_size
        if step.scored:
            assert output.scored is not None
            _take_prompt_logprobs(step, output.scored)
        if not requests:
            return []  # Partial prefills only, or dropped by a reset.
        outputs: list[EngineOutput] = []
        num_finished = 0
        logprobs = output.logprobs
        for i, (request, token_id) in enumerate(zip(requests, output.sampled_token_ids, strict=True)):
            if request.finish_reason is not None:
                continue
            request.num_placeholders -= 1
            token_ids = request.token_ids
            token_ids.append(token_id)
            num_tokens = len(token_ids)
            if num_tokens == request.num_prompt_tokens + 1:
                state.stats.prompt_tokens += request.num_prompt_tokens
                state.stats.prompt_tokens_cached += request.num_cached_tokens or 0
            if (token_id in request.stop_ids or num_tokens >= request.check_num_tokens) and self._ends(request):
                num_finished += 1
            elif num_tokens % block_size == 0:
                state.kv.cache_full_blocks(request)
            ended, why = request.finish_reason, request.stop_reason
            outputs.append(EngineOutput(request.request_id, [token_id], ended, why, request.num_cached_tokens or 0))
            if logprobs is not None and request.wants_logprobs:
                params = request.sampling_params
                outputs[-1].new_logprobs = [logprobs.of(i, params.logprobs, params.logprob_token_ids or ())]
            if request.prompt_logprobs is not None and num_tokens == request.num_prompt_tokens + 1:
                outputs[-1].prompt_logprobs = request.prompt_logprobs
        state.stats.generation_tokens += len(outputs)
        if num_finished:
            state.drop_finished()
        return outputs

    def constrained(self, scheduled: SchedulerOutput) -> list[tuple[int, Request]]:
        """Requests that sample in a step in flight and have a matcher, ended ones too, and where they are in it."""
        if not self._state.num_constrained:
            return []
        requests = self._state.in_flight[scheduled.step_id].sampling_requests()
        return [(i, request) for i, request in enumerate(requests) if request.matcher is not None]

    def unschedule(self, scheduled: SchedulerOutput) -> None:
        """Takes back the latest step, which was never dispatched; nothing else may have been called since `schedule`.

        Requests that the step admitted wait again. Those that it preempted stay preempted.
        """
        state = self._state
        assert next(reversed(state.in_flight)) == scheduled.step_id, "only the latest step can be taken back"
        step = state.in_flight.pop(scheduled.step_id)
        step.unscore()
        first_new_column = {id(request): first for request, first in step.grown}
        for index, request in enumerate(step.requests):
            request.num_computed_tokens -= scheduled.num_scheduled_tokens[index]
            request.num_placeholders -= index < step.num_sampled
            state.kv.take_back(request, first_new_column.get(id(request), len(request.block_ids)))
        for request in reversed(step.admitted):
            state.stop(request)
        for request in step.first_admitted:
            self._forget_admission(request)

    def fail_step(self, scheduled: Sequence[SchedulerOutput], error: str) -> list[EngineOutput]:
        """The device failed a step and the KV cache is lost.

        Args:
            scheduled: The failed step, then every step that was in flight behind it.
            error: What happened, for the users of the failed step's requests.

        Returns:
            The end, with finish_reason "error", of each request that was in the failed step. All others go on: those
            that ran are preempted, and the prefix cache is empty.
        """
        state = self._state
        lost = [s.step_id for s in scheduled]
        assert lost and list(state.in_flight)[-len(lost) :] == lost, "steps behind a failed one are lost as well"
        steps = [state.in_flight.pop(step_id) for step_id in lost]
        for step in steps:
            step.unscore()
            for request in step.sampling_requests():
                request.num_placeholders -= 1
        failed = [request for request in steps[0].requests if not request.is_finished]
        for request in failed:
            state.finish(request, "error")
        state.drop_finished()
        for request in reversed(state.running):
            state.preempt(request)
        done = state.kv.pool.reset()
        assert done, "nobody runs, so nobody holds blocks"
        return [EngineOutput(r.request_id, [], "error", None, r.num_cached_tokens or 0, error) for r in failed]

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forgets all cached blocks. False, and no change, while requests hold blocks.

        Args:
            reset_running_requests: Preempt the running requests first and drop the tokens in flight; they are computed
                again.

        Raises:
            RuntimeError: Blocks are held though nothing runs.
        """
        state = self._state
        if reset_running_requests:
            for request in reversed(state.running):
                state.preempt(request)
            for request in state.waiting:
                request.num_placeholders = 0
            for step in state.in_flight.values():
                step.drop()
        done = state.kv.pool.reset()
        if reset_running_requests and not done:
            raise RuntimeError("The prefix cache cannot be reset: KV blocks are held though no request runs.")
        return done

    # What can be seen from outside

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self._state.requests)

    @property
    def has_runnable_requests(self) -> bool:
        """Whether any is not blocked."""
        return len(self._state.requests) > len(self._state.blocked)

    @property
    def num_running(self) -> int:
        return len(self._state.running)

    @property
    def num_waiting(self) -> int:
        """Those that are blocked among them."""
        return len(self._state.waiting) + len(self._state.blocked)

    def stats(self) -> SchedulerStats:
        """A snapshot."""
        return replace(
            self._state.stats,
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            kv_cache_usage=self._state.kv.pool.usage,
        )

    def check_integrity(self) -> None:
        """Asserts the consistency of requests, rows, blocks, hashes and free list. For tests: it reads everything."""
        self._state.check_integrity()

    # Helpers

    def _validate(self, request: EngineRequest) -> None:
        if request.request_id in self._state.requests:
            raise VjaxValidationError(
                f"The request id {request.request_id!r} belongs to a request that is not finished; use another one.",
                parameter="request_id",
                value=request.request_id,
            )
        kv = self._state.kv
        check_request(request, self._config.max_model_len, kv.pool.num_blocks, kv.block_size)

    def _ends(self, request: Request) -> bool:
        """Whether the latest token ended the request: as EOS, else as stop token, by length, by repetition."""
        token_id = request.token_ids[-1]
        if token_id == request.eos_token_id:
            self._state.finish(request, "stop")
        elif token_id in request.stop_ids:
            self._state.finish(request, "stop", token_id)
        elif request.num_tokens >= request.max_num_tokens:
            self._state.finish(request, "length")
        else:
            repetition = request.sampling_params.repetition_detection
            assert repetition is not None, "nothing else is checked below max_num_tokens"
            if not ends_in_repetition(request.token_ids, request.num_prompt_tokens, repetition):
                return False
            self._state.finish(request, "repetition", REPETITION_DETECTED)
        return True

    def _forget_admission(self, request: Request) -> None:
        stats = self._state.stats
        if self._state.kv.pool.enable_caching and request.reads_prefix_cache:
            stats.prefix_cache_requests -= 1
            stats.prefix_cache_queries -= request.num_tokens
            stats.prefix_cache_hits -= request.num_cached_tokens or 0
        request.num_cached_tokens = None
        if request.metrics is not None:
            request.metrics.scheduled_ts, request.metrics.num_cached_tokens = 0.0, 0


def _take_prompt_logprobs(step: InFlightStep, scored: StepLogprobs) -> None:
    i = 0
    for request, _, count in step.scored:
        assert request.prompt_logprobs is not None
        k = request.sampling_params.prompt_logprobs
        request.prompt_logprobs += [scored.of(j, k) for j in range(i, i + count)]
        i += count
