"""Engine outputs of a model that pools to what users get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vjax.config.engine_config import EngineConfig
from vjax.config.pooler import Pooling
from vjax.engine.output_processor import OutputProcessor
from vjax.engine.pooling import ProcessedPooling, finished_values
from vjax.engine.recorder import MetricsRecorder
from vjax.messages import EngineOutput
from vjax.outputs import PoolingOutput, PoolingRequestOutput
from vjax.text.tokenizer import Tokenizer


def make_output_processor(config: EngineConfig, tokenizer: Tokenizer | None, recorder: MetricsRecorder | None) -> Any:
    """An `OutputProcessor`, or for an engine that pools a `PoolingOutputProcessor`."""
    if config.model.pooling is not None:
        return PoolingOutputProcessor(config.model.pooling, recorder)
    return OutputProcessor(tokenizer, recorder, config.stream_interval)


class PoolingOutputProcessor:
    """Keeps unfinished requests of a model that pools; what `OutputProcessor` is to one that generates, with the same
    methods."""

    def __init__(self, pooling: Pooling, recorder: MetricsRecorder | None = None):
        self._pooling = pooling
        self._recorder = recorder
        self._requests: dict[str, ProcessedPooling] = {}
        #: By the ids that the core knows.
        self._by_core_id: dict[str, ProcessedPooling] = {}

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def request_ids(self) -> list[str]:
        return list(self._requests)

    def has_request(self, request_id: str) -> bool:
        return request_id in self._requests

    def add_request(self, processed: ProcessedPooling) -> None:
        self._requests[processed.request_id] = processed
        self._by_core_id[processed.requests[0].request_id] = processed

    def abort(self, request_ids: Sequence[str]) -> list[str]:
        """Forgets requests; unknown and finished ids are ignored. Returns the ids that the core must abort."""
        if self._recorder is not None:
            self._recorder.tick()
        found = [self._requests[request_id] for request_id in request_ids if request_id in self._requests]
        for processed in found:
            self._finish(processed, "abort")
        return [processed.requests[0].request_id for processed in found]

    def abort_outputs(self, request_ids: Sequence[str]) -> list[EngineOutput]:
        """What ends requests, for `process`. Unknown and finished ids are ignored."""
        return [
            EngineOutput(self._requests[request_id].requests[0].request_id, [], "abort")
            for request_id in dict.fromkeys(request_ids)
            if request_id in self._requests
        ]

    def process(self, outputs: Sequence[EngineOutput]) -> tuple[list[PoolingRequestOutput[PoolingOutput]], list[str]]:
        """Takes one step's outputs, each of which ends its request. Those of unknown (aborted) requests are ignored.

        Returns:
            What is to be shown, and no ids: the core knows what has ended.
        """
        if self._recorder is not None:
            self._recorder.tick()
        shown: list[PoolingRequestOutput[PoolingOutput]] = []
        for output in outputs:
            processed = self._by_core_id.get(output.request_id)
            if processed is None:
                continue
            assert output.finish_reason is not None
            self._finish(processed, output.finish_reason)
            values, error = np.zeros(0, np.float32), output.error or output.finish_reason
            if output.pooled is not None:
                ids = processed.prompt_token_ids
                values, error = finished_values(output.pooled, processed.params, self._pooling, ids), None
            shown.append(
                PoolingRequestOutput(
                    request_id=processed.request_id,
                    outputs=PoolingOutput(values),
                    prompt_token_ids=processed.prompt_token_ids,
                    num_cached_tokens=output.num_cached_tokens,
                    finished=True,
                    error=error,
                    metrics=processed.requests[0].metrics,
                )
            )
        return shown, []

    def _finish(self, processed: ProcessedPooling, reason: str) -> None:
        request = processed.requests[0]
        del self._requests[processed.request_id], self._by_core_id[request.request_id]
        if self._recorder is not None and request.metrics is not None:
            self._recorder.pooling_finished(request.metrics, len(processed.prompt_token_ids), reason)
