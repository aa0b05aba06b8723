"""What a step was given to do, as a record for people: taken only while somebody records."""

from __future__ import annotations

from vjax.messages import SchedulerOutput
from vjax.outputs import RequestStep, StepRecord
from vjax.request import Request
from vjax.scheduler.state import SchedulerState


class StepRecording:
    """Collects a `StepRecord` per step.

    Args:
        blocks: False: block tables and cached blocks are left empty, which costs less.
    """

    def __init__(self, *, blocks: bool):
        self.steps: list[StepRecord] = []
        self._blocks = blocks

    def add(self, scheduled: SchedulerOutput, requests: list[Request], state: SchedulerState) -> None:
        """Takes the record of a step that was just scheduled; `requests` are in the order of `scheduled.rows`."""
        in_step = set(map(id, requests))
        idle = [request for request in state.running if id(request) not in in_step]
        numbers = scheduled.num_scheduled_tokens + [0] * len(idle)
        self.steps.append(
            StepRecord(
                step_id=scheduled.step_id,
                requests=tuple(self._request_step(r, n) for r, n in zip(requests + idle, numbers, strict=True)),
                num_waiting=len(state.waiting),
                cached_block_ids=state.kv.pool.cached_block_ids() if self._blocks else frozenset(),
            )
        )

    def _request_step(self, request: Request, num_tokens: int) -> RequestStep:
        return RequestStep(
            request_id=request.request_id,
            num_prompt_tokens=request.num_prompt_tokens,
            num_tokens=num_tokens,
            num_computed_tokens=request.num_computed_tokens,
            num_cached_tokens=request.num_cached_tokens or 0,
            block_ids=tuple(request.block_ids) if self._blocks else (),
        )
