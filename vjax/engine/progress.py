"""The scheduler's notes on requests (`EngineRequest.metrics`), carried to a front end in another process."""

from __future__ import annotations

from collections.abc import Iterable

from vjax.engine.protocol import Outputs, Progress
from vjax.messages import EngineRequest
from vjax.outputs import RequestMetrics


class ProgressSender:
    """The core's side: adds to each step's outputs what is new of their requests."""

    def __init__(self) -> None:
        self._requests: dict[str, RequestMetrics] = {}
        self._sent: dict[str, Progress] = {}

    def add(self, requests: Iterable[EngineRequest]) -> None:
        for request in requests:
            if request.metrics is not None:
                self._requests[request.request_id] = request.metrics

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._requests.pop(request_id, None)
            self._sent.pop(request_id, None)

    def attach(self, message: Outputs) -> None:
        """Fills in `message.progress`, and forgets requests that end with it."""
        if not self._requests:
            return
        progress: dict[str, Progress] = {}
        for output in message.outputs:
            request_id = output.request_id
            metrics = self._requests.get(request_id)
            if metrics is None:
                continue
            now = (metrics.scheduled_ts, metrics.num_cached_tokens, metrics.num_preemptions)
            if self._sent.get(request_id) != now:
                progress[request_id] = self._sent[request_id] = now
            if output.finish_reason is not None:
                self.forget((request_id,))
        message.progress = progress


class ProgressReceiver:
    """The front end's side: writes it into the records of the front end's own requests."""

    def __init__(self) -> None:
        self._requests: dict[str, RequestMetrics] = {}

    def add(self, requests: Iterable[EngineRequest]) -> None:
        for request in requests:
            if request.metrics is not None:
                self._requests[request.request_id] = request.metrics

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._requests.pop(request_id, None)

    def apply(self, message: Outputs) -> None:
        for request_id, progress in message.progress.items():
            if metrics := self._requests.get(request_id):
                metrics.scheduled_ts, metrics.num_cached_tokens, metrics.num_preemptions = progress
        if self._requests:
            self.forget(output.request_id for output in message.outputs if output.finish_reason is not None)
