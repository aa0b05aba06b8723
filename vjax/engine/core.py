"""The engine core: the one place that sees both the scheduler and the runner.

It knows token ids only: no text, no stop strings, no outputs in a user's shape.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from vjax.engine.control import EngineControl
from vjax.engine.profiler import Profiler
from vjax.errors import EngineAsleepError, EngineStepError
from vjax.log import logger
from vjax.messages import EngineOutput, EngineRequest, SchedulerOutput
from vjax.request import Request
from vjax.runner.runner import ModelRunner, StepHandle
from vjax.scheduler.scheduler import Scheduler
from vjax.scheduler.stats import SchedulerStats
from vjax.structured.compiler import GrammarCompiler
from vjax.structured.compiling import Compilations
from vjax.structured.matcher import MaskFiller

log = logger(__name__)


class EngineCore(EngineControl):
    """Schedules, executes, updates.

    Args:
        scheduler: Decides what runs; owns requests and KV blocks.
        runner: Runs it; owns the device.
        async_scheduling: Dispatch step N+1 before the tokens of step N are on the host.
        profiler: Writes profiles; None: there are none.
        grammars: For requests with a grammar; None: there are none.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        *,
        async_scheduling: bool,
        profiler: Profiler | None = None,
        grammars: GrammarCompiler | None = None,
    ):
        super().__init__(scheduler, runner, self._step_overlapped if async_scheduling else self._step, profiler)
        self.grammars = grammars
        self._compilations = Compilations(grammars)
        self._masks = MaskFiller()
        self._in_flight: deque[tuple[SchedulerOutput, StepHandle]] = deque()

    def _step(self) -> list[EngineOutput]:
        """One step, start to end."""
        if self._compilations and (failed := self._take_compiled()):
            return failed
        scheduled = self.scheduler.schedule()
        if not scheduled.rows:
            return []
        early: list[EngineOutput] = []
        try:
            output = self._execute(scheduled, early).result()
        except EngineStepError as e:
            return early + self._recover([scheduled], e)
        return early + self.scheduler.update(scheduled, output)

    def _step_overlapped(self) -> list[EngineOutput]:
        """The same, with the next step on the device while the host waits for this one: outputs come one step late."""
        if self._compilations and (failed := self._take_compiled()):
            return failed
        scheduled = self.scheduler.schedule()
        early: list[EngineOutput] = []
        try:
            if scheduled.rows:
                self._in_flight.append((scheduled, self._execute(scheduled, early)))
                if len(self._in_flight) == 1:
                    return early
            if not self._in_flight:
                return []
            return self._finish_oldest()
        except EngineStepError as e:
            lost = [s for s, _ in self._in_flight]
            if scheduled.rows and scheduled not in lost:
                lost.append(scheduled)
            return early + self._recover(lost, e)

    def _finish_oldest(self) -> list[EngineOutput]:
        oldest, handle = self._in_flight[0]
        output = handle.result()
        self._in_flight.popleft()
        return self.scheduler.update(oldest, output)

    def _finish_in_flight(self) -> list[EngineOutput]:
        outputs: list[EngineOutput] = []
        while self._in_flight:
            scheduled, handle = self._in_flight[0]
            try:
                output = handle.result()
            except EngineStepError as e:
                return outputs + self._recover([s for s, _ in self._in_flight], e)
            self._in_flight.popleft()
            outputs += self.scheduler.update(scheduled, output)
        return outputs

    def _execute(self, scheduled: SchedulerOutput, early: list[EngineOutput]) -> StepHandle:
        """Dispatches a step. What had to be known for that, of the steps before it, is appended to `early`."""
        constrained = self.scheduler.constrained(scheduled)
        try:
            if constrained:
                handle = self.runner.execute(scheduled, partial(self._fill_mask, constrained, early))
            else:
                handle = self.runner.execute(scheduled)
        except EngineStepError:
            raise
        except BaseException:
            # Nothing reached the device: the requests stay as they were.
            self.scheduler.unschedule(scheduled)
            raise
        self.scheduler.cache_scheduled_blocks()
        return handle

    def _fill_mask(self, constrained: list[tuple[int, Request]], early: list[EngineOutput], mask: np.ndarray) -> None:
        """Leaves in the mask of a step what the grammars of its requests allow, while the device computes its forward:
        tokens of the step before are waited for, since they decide it."""
        if len(constrained) < len(mask):
            mask[:] = -1
        while self._in_flight:
            early += self._finish_oldest()
        live = [(row, request) for row, request in constrained if request.finish_reason is None]
        self._masks.follow([(r.matcher, r.token_ids, r.num_prompt_tokens) for _, r in live])
        self._masks.fill(mask, [(row, r.matcher) for row, r in live])
        for row, request in live:
            if error := request.matcher.error:
                mask[row] = -1
                early.append(self.scheduler.fail(request, f"the grammar cannot be followed any further: {error}"))

    def _recover(self, lost: list[SchedulerOutput], error: EngineStepError) -> list[EngineOutput]:
        """The device failed: the first lost step's requests end with an error, every other one starts over."""
        log.error("%s; its requests fail, the KV cache is rebuilt and the engine goes on", error)
        self._in_flight.clear()
        self.runner.reset()
        return self.scheduler.fail_step(lost, str(error))

    def add_request(self, request: EngineRequest) -> None:
        """A grammar that is not known yet is compiled meanwhile: its request waits, and fails if it is none.

        Raises:
            VjaxValidationError: The request can never run.
        """
        if request.grammar is None:
            self.scheduler.add(request)
            return
        assert self.grammars is not None
        matcher = self.grammars.ready(request.grammar)
        added = self.scheduler.add(request, matcher, blocked=matcher is None)
        if matcher is None:
            self._compilations.begin(request.grammar, added)

    def _take_compiled(self) -> list[EngineOutput]:
        """Queues the requests whose grammars are ready, waiting for one where nothing else can run. Returns the ends of
        those whose grammars are none."""
        failed: list[EngineOutput] = []
        wait = self.scheduler.has_unfinished_requests and not self.scheduler.has_runnable_requests
        for request, matcher in self._compilations.take(wait=wait):
            if request.is_finished:
                continue
            if isinstance(matcher, Exception):
                failed.append(self.scheduler.fail(request, f"the grammar cannot be used: {matcher}"))
            else:
                self.scheduler.unblock(request, matcher)
        return failed

    def wake_by(self, wake: Callable[[], None]) -> None:
        """Has `wake` called, in any thread, when `has_work` becomes true by itself."""
        self._compilations.on_done = wake

    @property
    def _can_step(self) -> bool:
        return self.scheduler.has_runnable_requests or self._compilations.has_done

    def abort_requests(self, request_ids: Sequence[str]) -> list[str]:
        """Ends requests at once; returns the ids that were alive."""
        return self.scheduler.abort(request_ids)

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forgets every cached block; False while a request holds blocks."""
        return self.scheduler.reset_prefix_cache(reset_running_requests)

    @property
    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished_requests

    def stats(self) -> SchedulerStats:
        """The scheduler's numbers of now."""
        return self.scheduler.stats()

    #: The numbers after the latest step whose outputs were handed out.
    latest_stats = stats

    def call(self, method: str, *arguments: Any) -> Any:
        """A method by its name, as clients in other processes call it."""
        return getattr(self, method)(*arguments)

    def warm_up(self) -> None:
        """Compiles and runs everything that any step may need. To be called while nothing runs.

        Raises:
            EngineAsleepError: The engine sleeps.
        """
        if self.is_sleeping():
            raise EngineAsleepError("The engine is asleep: call wake_up() before warm_up().")
        self.runner.executables.compile_all()
        self.runner.warm_up()

    def least_bytes_read(self, num_keys: int) -> dict[str, int]:
        """What a decode step over num_keys keys in all has to read: bytes of "weights" and of the "KV cache"."""
        return self.runner.step.least_bytes_read(num_keys)

    def num_compilations_while_serving(self) -> int:
        """Compilations that a step had to wait for."""
        return self.runner.executables.num_compilations_while_serving

    def shutdown(self) -> None:
        self._in_flight.clear()
        self._compilations.shutdown()
        self._profiler.shutdown()
        self.runner.shutdown()
