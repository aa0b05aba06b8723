"""An engine core in another process, for a front end that steps: what `EngineCore` is to it, with the same methods."""

from __future__ import annotations

import dataclasses
import itertools
import queue
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from vjax.config.engine_args import EngineArgs
from vjax.engine.process_client import start_process
from vjax.engine.protocol import EngineInfo, Outputs
from vjax.errors import EngineAsleepError, EngineDeadError
from vjax.messages import EngineOutput, EngineRequest
from vjax.scheduler.stats import SchedulerStats

#: Methods after which the core may be asleep, or awake again.
_WAKING = frozenset({"wake_up", "end_weight_update", "abandon_weight_update"})


class ProcessCore:
    """Starts the process; the core in it steps by itself, and `step` takes what a step of it gave.

    Raises:
        ConfigError, ModelLoadError, OutOfMemoryError: As `build_engine`.
        EngineDeadError: From every method, once the process has ended.
    """

    def __init__(self, args: EngineArgs):
        self._arrived: queue.SimpleQueue[Outputs | EngineDeadError] = queue.SimpleQueue()
        # A request's id in the core is its own: outputs of an aborted request, which may still be on the way, cannot
        # be taken for those of a later one of the same id.
        self._numbers = itertools.count()
        self._core_ids: dict[str, str] = {}
        self._request_ids: dict[str, str] = {}
        self._stats = SchedulerStats()
        self._is_asleep = False
        self._client, self.tokenizer = start_process(args, self._outputs_arrived, self._died)

    @property
    def info(self) -> EngineInfo:
        return self._client.info

    def add_request(self, request: EngineRequest) -> None:
        """Raises: VjaxValidationError where the request can never run."""
        core_id = f"{next(self._numbers)}:{request.request_id}"
        self._client.add_requests([dataclasses.replace(request, request_id=core_id)])
        self._core_ids[request.request_id] = core_id
        self._request_ids[core_id] = request.request_id

    def abort_requests(self, request_ids: Sequence[str]) -> list[str]:
        """Ends requests at once; returns the ids that were alive."""
        alive = [request_id for request_id in request_ids if request_id in self._core_ids]
        core_ids = [self._core_ids.pop(request_id) for request_id in alive]
        for core_id in core_ids:
            del self._request_ids[core_id]
        self._client.abort_requests(core_ids)
        return alive

    def step(self) -> list[EngineOutput]:
        """The outputs of one step, waited for if there are unfinished requests.

        Raises:
            EngineAsleepError: They would never come.
        """
        if not self._core_ids:
            return []
        if self._is_asleep and self._arrived.empty():
            raise EngineAsleepError("The engine is asleep, and requests wait for it: call wake_up().")
        message = self._arrived.get()
        if isinstance(message, EngineDeadError):
            self._core_ids.clear()
            self._request_ids.clear()
            raise message
        if message.stats is not None:
            self._stats = message.stats
        outputs = []
        for output in message.outputs:
            request_id = self._request_ids.get(output.request_id)
            if request_id is None:
                continue
            if output.finish_reason is not None:
                del self._request_ids[output.request_id], self._core_ids[request_id]
            output.request_id = request_id
            outputs.append(output)
        return outputs

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self._core_ids)

    def latest_stats(self) -> SchedulerStats:
        """The numbers after the latest step whose outputs were handed out."""
        return self._stats

    def stats(self) -> SchedulerStats:
        """The scheduler's numbers of now."""
        return self.call("stats")

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        return self.call("reset_prefix_cache", reset_running_requests)

    def warm_up(self) -> None:
        self.call("warm_up")

    def least_bytes_read(self, num_keys: int) -> dict[str, int]:
        return self.call("least_bytes_read", num_keys)

    def num_compilations_while_serving(self) -> int:
        return self.call("num_compilations_while_serving")

    def sleep(self, level: int, wait: bool = False) -> Future[None]:
        """Done when it returns; see `EngineControl.sleep`. Outputs of steps that it waited for have arrived."""
        done = self._client.wait_for("sleep", level, wait)
        self._is_asleep = self.call("is_sleeping")
        return done

    def call(self, method: str, *arguments: Any) -> Any:
        """A method of `EngineCore` by its name."""
        try:
            return self._client.wait_for(method, *arguments).result()
        finally:
            if method in _WAKING:
                self._is_asleep = self._client.wait_for("is_sleeping").result()

    def shutdown(self) -> None:
        self._client.shutdown()

    def _outputs_arrived(self, message: Outputs) -> None:
        self._arrived.put(message)

    def _died(self, error: EngineDeadError) -> None:
        self._arrived.put(error)
