"""The scheduler of a model that pools: nothing is sampled, and a request ends with the step that computes the last
token of its prompt.

States of tokens are asked for as their chunks are scheduled, each once: what a preempted request computes again is not
asked for again. So prompts may be split, whatever becomes of their tokens.
"""

from __future__ import annotations

import numpy as np

from vjax.messages import EngineOutput, PooledTokens, SchedulerOutput, StepOutput
from vjax.request import Request
from vjax.scheduler.scheduler import Scheduler
from vjax.scheduler.step import InFlightStep


class PoolingScheduler(Scheduler):
    """Of requests with a `pooling_type`: where one that generates samples its first token, it ends."""

    def schedule(self) -> SchedulerOutput:
        scheduled = super().schedule()
        if scheduled.rows:
            _ask_for_states(scheduled, self._state.in_flight[scheduled.step_id])
        return scheduled

    def update(self, scheduled: SchedulerOutput, output: StepOutput) -> list[EngineOutput]:
        """Hands the vectors of the oldest step in flight to their requests and ends those whose prompt is computed: one
        output for each."""
        state, step_id = self._state, scheduled.step_id
        assert next(iter(state.in_flight)) == step_id == output.step_id, "steps return in the order of execution"
        step = state.in_flight.pop(step_id)
        _take_states(step, output)
        outputs: list[EngineOutput] = []
        for request in step.sampling_requests():
            if request.finish_reason is not None:
                continue
            request.num_placeholders -= 1
            num_cached = request.num_cached_tokens or 0
            state.stats.prompt_tokens += request.num_prompt_tokens
            state.stats.prompt_tokens_cached += num_cached
            state.finish(request, "stop")
            outputs.append(EngineOutput(request.request_id, [], "stop", None, num_cached, pooled=_pooled(request)))
        if outputs:
            state.drop_finished()
        return outputs


def _ask_for_states(scheduled: SchedulerOutput, step: InFlightStep) -> None:
    scheduled.pooled = pooled = PooledTokens()
    index = 0
    for request, n in zip(step.requests, scheduled.num_scheduled_tokens, strict=True):
        start = request.num_computed_tokens - n
        first = max(start, request.num_pooled_tokens)
        end = min(request.num_computed_tokens, request.pooled_end)
        if first < end:
            offset = index - start
            if request.pooling_type == "MEAN":
                pooled.starts.append(first + offset)
                pooled.ends.append(end + offset)
            else:
                pooled.indices += range(first + offset, end + offset)
            request.num_pooled_tokens = end
            step.pooled.append((request, first, end - first))
        index += n


def _take_states(step: InFlightStep, output: StepOutput) -> None:
    vector = total = 0
    for request, _, count in step.pooled:
        if request.pooling_type == "MEAN":
            assert output.sums is not None
            request.pooled_parts.append(output.sums[total : total + 1])
            total += 1
        else:
            assert output.vectors is not None
            request.pooled_parts.append(output.vectors[vector : vector + count])
            vector += count


def _pooled(request: Request) -> np.ndarray:
    """f32 [width], or [prompt tokens, width] with "ALL"."""
    parts = np.concatenate(request.pooled_parts)
    if request.pooling_type == "ALL":
        assert len(parts) == request.num_prompt_tokens
        return parts
    if request.pooling_type == "MEAN":
        return parts.sum(axis=0) / np.float32(request.num_prompt_tokens)
    assert len(parts) == 1
    return parts[0]
