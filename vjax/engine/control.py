"""What an engine core can be told between two steps: to sleep and wake up, to take new weights, to write a profile.

A core that sleeps takes requests and runs none. Sleeping has levels: 0 stops scheduling, 1 frees the KV cache and moves
the weights to the host, 2 drops the weights as well.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from vjax.engine.profiler import Profiler
from vjax.errors import EngineAsleepError, VjaxValidationError
from vjax.log import logger
from vjax.messages import EngineOutput
from vjax.runner.runner import ModelRunner
from vjax.scheduler.scheduler import Scheduler
from vjax.weights.update import ArraySpec, Key

log = logger(__name__)


class EngineControl(ABC):
    """The part of `EngineCore` that is not the step.

    Args:
        scheduler: The core's.
        runner: The core's.
        step: One step of the core while it is awake.
        profiler: None: this core writes no profiles.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        step: Callable[[], list[EngineOutput]],
        profiler: Profiler | None,
    ):
        self.scheduler = scheduler
        self.runner = runner
        self._profiler = profiler or Profiler(None)
        self._awake_step = step
        #: One step of the core; which one depends on whether it is awake, falls asleep or sleeps.
        self.step = step
        self._is_asleep = False
        #: Level and waiter of each `sleep` that waits for running requests.
        self._falling_asleep: list[tuple[int, Future[None]]] = []
        #: Of the steps that were in flight when the core fell asleep; its next step hands them out.
        self._late_outputs: list[EngineOutput] = []
        self._is_updating = False
        self._wakes_after_update = False

    @abstractmethod
    def _finish_in_flight(self) -> list[EngineOutput]:
        """Waits for the steps in flight and returns their outputs."""

    @property
    @abstractmethod
    def _can_step(self) -> bool:
        """Whether a step of the core while it is awake would do something."""

    @property
    def has_work(self) -> bool:
        """A step would do something."""
        if self._is_asleep or self._late_outputs:
            return bool(self._late_outputs)
        return self._can_step or bool(self._falling_asleep)

    # ---- sleep --------------------------------------------------------------------------------------------------

    def is_sleeping(self) -> bool:
        """Asleep at any level, in part as well."""
        return self._is_asleep

    def sleep(self, level: int, wait: bool = False) -> Future[None]:
        """Stops scheduling, and frees device memory from level 1 on. May be called again to sleep more deeply.

        Args:
            level: 0, 1 or 2.
            wait: Running requests are finished first, by further steps, and no waiting one starts meanwhile. False:
                running requests wait, and are computed again if the KV cache goes.

        Returns:
            Done when the core sleeps.

        Raises:
            RuntimeError: An update of the weights is under way.
        """
        self._check_not_updating()
        done: Future[None] = Future()
        self._falling_asleep.append((level, done))
        if wait and not self._is_asleep and self.scheduler.num_running:
            self.scheduler.set_admission(False)
            self.step = self._step_falling_asleep
        else:
            self._fall_asleep()
        return done

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Brings back what `tags` name, of "weights", "kv_cache" and "scheduling"; None is all of it. Requests run as
        soon as nothing sleeps any more.

        Weights that were dropped, and not updated since, are loaded anew.

        Raises:
            EngineAsleepError: Scheduling alone cannot go on while weights or KV cache sleep.
            OutOfMemoryError, ModelLoadError: What cannot be brought back sleeps on.
            RuntimeError: An update of the weights is under way.
        """
        self._check_not_updating()
        for _, waiter in self._stop_falling_asleep():
            waiter.set_exception(RuntimeError("wake_up() was called before the engine slept."))
        if not self._is_asleep:
            log.warning("wake_up: the engine is not asleep")
            return
        before = self.runner.asleep
        if tags is not None and set(tags) == {"scheduling"} and before:
            raise EngineAsleepError(
                f"Scheduling cannot go on while {' and '.join(sorted(before))} sleep: call wake_up() without tags."
            )
        self.runner.wake_up(("weights", "kv_cache") if tags is None else tags)
        if not self.runner.asleep and (before or tags is None or "scheduling" in tags):
            self._wake()

    def _fall_asleep(self) -> None:
        self._late_outputs += self._finish_in_flight()
        self._is_asleep = True
        self.step = self._step_asleep
        waiters, self._falling_asleep = self._falling_asleep, []
        level = max((level for level, _ in waiters), default=0)
        try:
            if level:
                self.scheduler.reset_prefix_cache(reset_running_requests=True)
                self.runner.sleep(level)
        except Exception as e:
            for _, waiter in waiters:
                waiter.set_exception(e)
        else:
            for _, waiter in waiters:
                waiter.set_result(None)

    def _stop_falling_asleep(self) -> list[tuple[int, Future[None]]]:
        waiters, self._falling_asleep = self._falling_asleep, []
        if waiters:
            self.scheduler.set_admission(True)
            self.step = self._awake_step
        return waiters

    def _wake(self) -> None:
        self._is_asleep = False
        self.scheduler.set_admission(True)
        self.step = self._awake_step if not self._late_outputs else self._step_awakened

    def _step_falling_asleep(self) -> list[EngineOutput]:
        if self.scheduler.num_running:
            return self._awake_step()
        self._fall_asleep()
        return self._take_late_outputs()

    def _step_asleep(self) -> list[EngineOutput]:
        outputs = self._take_late_outputs()
        if not outputs and self.scheduler.has_unfinished_requests:
            raise EngineAsleepError("The engine is asleep, and requests wait for it: call wake_up().")
        return outputs

    def _step_awakened(self) -> list[EngineOutput]:
        self.step = self._awake_step
        return self._take_late_outputs()

    def _take_late_outputs(self) -> list[EngineOutput]:
        outputs, self._late_outputs = self._late_outputs, []
        return outputs

    # ---- weights ------------------------------------------------------------------------------------------------

    def weight_names(self) -> list[str]:
        """The leaves, in the engine's order."""
        return list(self.runner.weights.names())

    def get_weight(self, name: str) -> np.ndarray:
        """A copy of one leaf; see `Weights.host_copy`."""
        return self.runner.weights.host_copy(name)

    def begin_weight_update(self, specs: Mapping[Key, ArraySpec], partial: bool) -> list[list[Key]]:
        """Checks new weights, and stops scheduling until `end_weight_update`; see `Weights.begin_update`.

        Raises:
            VjaxValidationError: They do not fit; nothing has changed.
            EngineAsleepError: The update is partial, and the other weights sleep.
            RuntimeError: Requests are unfinished, and the engine does not sleep; or another update is under way.
        """
        self._check_not_updating()
        if not self._is_asleep and self.scheduler.has_unfinished_requests:
            raise RuntimeError(
                "The weights cannot change while requests are unfinished: wait for them, abort them, or let them wait "
                "by sleep(level=0, mode='keep') until wake_up(), which computes their KV again."
            )
        groups = self.runner.weights.begin_update(specs, partial=partial)
        self._is_updating, self._wakes_after_update = True, not self._is_asleep
        self._fall_asleep()
        return groups

    def put_weights(self, arrays: Mapping[Key, Any]) -> None:
        """Exchanges one leaf; see `Weights.update`."""
        self.runner.weights.update(arrays)

    def end_weight_update(self) -> None:
        """The new weights count from now on; what was computed with the old ones is forgotten."""
        self.runner.weights.end_update()
        self._updated()

    def abandon_weight_update(self) -> None:
        """Ends what `begin_weight_update` began, if it did. Where a leaf has been exchanged all are dropped, and the
        engine sleeps."""
        if not self._is_updating:
            return
        self.runner.weights.abandon_update()
        if not self.runner.weights.are_on_device:
            log.error(
                "an update of the weights was not finished, so they were dropped: wake_up() loads the checkpoint's"
            )
        self._updated()

    def _check_not_updating(self) -> None:
        if self._is_updating:
            raise RuntimeError("An update of the weights is under way; wait for it.")

    def _updated(self) -> None:
        self._is_updating = False
        self.runner.use_weights()
        self.scheduler.reset_prefix_cache(reset_running_requests=True)
        if self._wakes_after_update and not self.runner.asleep:
            self._wake()

    # ---- the rest -----------------------------------------------------------------------------------------------

    def collective_rpc(self, method: str | Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Calls a public method of the runner, or a function with the runner as its first argument.

        Raises:
            VjaxValidationError: There is no such method.
        """
        if not isinstance(method, str):
            return method(self.runner, *args, **kwargs)
        function = None if method.startswith("_") else getattr(self.runner, method, None)
        if not callable(function):
            names = [n for n in dir(self.runner) if not n.startswith("_") and callable(getattr(self.runner, n))]
            raise VjaxValidationError(
                f"The runner has no method {method!r}; there are {', '.join(names)}. Or pass a function, which gets "
                "the runner.",
                parameter="method",
                value=method,
            )
        return function(*args, **kwargs)

    def collective_rpc_pickled(self, call: bytes) -> Any:
        """`collective_rpc` for a caller in another process: what cannot be read here is that call's error alone."""
        return self.collective_rpc(*pickle.loads(call))

    def start_profile(self, prefix: str | None = None) -> None:
        """See `Profiler.start`."""
        self._profiler.start(prefix)

    def stop_profile(self) -> None:
        """See `Profiler.stop`."""
        self._profiler.stop()
