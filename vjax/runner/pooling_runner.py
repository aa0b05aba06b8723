"""Dispatches the steps of a model that pools: a forward that keeps every token's hidden state, then `pool`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from vjax.errors import EngineStepError
from vjax.messages import SchedulerOutput, StepOutput
from vjax.runner.programs import PoolBucket
from vjax.runner.runner import FillMask, ModelRunner
from vjax.runner.step import POOLED_VECTORS


@dataclass(slots=True)
class PoolingHandle:
    """A dispatched step."""

    step_id: int
    #: Ready when the forward has run.
    done: Any
    #: (vectors that count, f32 [POOLED_VECTORS, width] on the way to the host), in order.
    vectors: list[tuple[int, Any]]
    sums: list[tuple[int, Any]]

    def result(self) -> StepOutput:
        """Blocks until the step has run.

        Raises:
            EngineStepError: The device failed.
        """
        try:
            self.done.block_until_ready()
            return StepOutput(self.step_id, [], vectors=_joined(self.vectors), sums=_joined(self.sums))
        except jax.errors.JaxRuntimeError as e:
            raise EngineStepError(f"step {self.step_id} failed on the device: {e}") from e


class PoolingRunner(ModelRunner):
    """The runner of a model that pools. Rows are kept as for one that generates; nothing is sampled from them."""

    def execute(self, scheduled: SchedulerOutput, fill_mask: FillMask | None = None) -> PoolingHandle:  # pyright: ignore
        """Dispatches one step and returns at once.

        Raises:
            EngineStepError: The dispatch failed; the device state is lost and `reset` is due.
        """
        assert fill_mask is None and scheduled.pooled is not None, scheduled
        bucket, forward = self.executables.forward_for(scheduled.num_tokens, len(scheduled.rows))
        layout = self.step.layout(bucket)
        fits = layout.fits(scheduled)
        packed = layout.pack(scheduled, with_updates=fits)
        pooled = scheduled.pooled
        try:
            self._write_ahead(scheduled, fits)
            done, hidden = self._forward(bucket, forward, packed)
            vectors = self._pool(hidden, np.array(pooled.indices, np.int32), sums=False)
            sums = self._pool(hidden, np.array([pooled.starts, pooled.ends], np.int32), sums=True)
        except EngineStepError:
            raise
        except (jax.errors.JaxRuntimeError, RuntimeError) as e:
            raise EngineStepError(f"step {scheduled.step_id} could not be dispatched: {e}") from e
        return PoolingHandle(scheduled.step_id, done, vectors, sums)

    def _pool(self, hidden: jax.Array, asked: np.ndarray, *, sums: bool) -> list[tuple[int, Any]]:
        """Of indices [N] or ranges [2, N] in `hidden`, as many as one program gives at a time."""
        parts: list[tuple[int, Any]] = []
        for start in range(0, asked.shape[-1], POOLED_VECTORS):
            part = asked[..., start : start + POOLED_VECTORS]
            packed = np.zeros((*asked.shape[:-1], POOLED_VECTORS), np.int32)
            packed[..., : part.shape[-1]] = part
            result = self.executables.pool_for(hidden.shape[0], sums=sums)(self._head, hidden, packed)
            result.copy_to_host_async()
            parts.append((part.shape[-1], result))
        return parts

    def _run_empty(self, key: Any, compiled: Any) -> None:
        if not isinstance(key, PoolBucket):
            super()._run_empty(key, compiled)
            return
        hidden = np.zeros((key.num_tokens, self.step.model.arch.hidden_size), self.step.model.dtype)
        shape = (2, POOLED_VECTORS) if key.sums else (POOLED_VECTORS,)
        compiled(self._head, hidden, np.zeros(shape, np.int32))


def _joined(parts: list[tuple[int, Any]]) -> np.ndarray | None:
    if not parts:
        return None
    return np.concatenate([np.asarray(result)[:count] for count, result in parts])
