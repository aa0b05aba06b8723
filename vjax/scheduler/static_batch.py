"""Static batching, V0's policy: the simple baseline that continuous batching is measured against."""

from __future__ import annotations

from vjax.scheduler.batching import admit_waiting, schedule_running
from vjax.scheduler.state import SchedulerState
from vjax.scheduler.step import StepBuilder


class StaticBatch:
    """One batch at a time: prefill all of it, then decode until all of it is done, then the next one.

    The batch is what waits, up to max_num_seqs, at the moment at which nothing runs; less where blocks run out. Its
    prompts are prefilled in as many steps as the budget needs. What decoding preempts waits for the next batch.
    """

    def __init__(self) -> None:
        #: Waiting requests that may still join the batch; 0 once it decodes.
        self._places = 0

    def fill(self, state: SchedulerState, step: StepBuilder) -> None:
        if not state.running:
            self._places = min(len(state.waiting), state.config.max_num_seqs)
        prefilling = [r for r in state.running if r.num_computed_tokens < r.num_prefill_tokens]
        if prefilling or self._places:
            schedule_running(state, step, prefilling)
            self._places -= admit_waiting(state, step, self._places)
            if not step.is_empty:
                return
            self._places = 0
        schedule_running(state, step, list(state.running))
