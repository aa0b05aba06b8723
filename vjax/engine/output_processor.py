"""Engine outputs to request outputs: text, stop strings, n completions of one prompt, and what is shown when.

[EngineOutput, ...] -> ([RequestOutput, ...], ids that a stop string ended and the core must abort)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vjax.engine.input_processor import ProcessedRequest
from vjax.engine.recorder import MetricsRecorder, merged
from vjax.logprobs import FlatLogprobs, Logprob
from vjax.messages import EngineOutput, SampledLogprobs
from vjax.outputs import CompletionOutput, RequestMetrics, RequestOutput
from vjax.sampling_params import RequestOutputKind
from vjax.text.detokenizer import make_detokenizer
from vjax.text.tokenizer import Tokenizer


class _Prompt:
    """A user's request: one prompt and its completions."""

    __slots__ = ("num_cached_tokens", "num_running", "processed", "prompt_logprobs", "sequences")

    def __init__(self, processed: ProcessedRequest, tokenizer: Tokenizer | None, stream_interval: int):
        self.processed = processed
        self.sequences = [_Sequence(self, i, tokenizer, stream_interval) for i in range(len(processed.requests))]
        self.num_running = len(self.sequences)
        self.num_cached_tokens: int | None = None
        #: One per token, None for the first; None until they arrive, and if they were not asked for.
        self.prompt_logprobs: list[dict[int, Logprob] | None] | FlatLogprobs | None = None


class _Sequence:
    """One completion."""

    __slots__ = (
        "completion",
        "cumulative_logprob",
        "detokenizer",
        "index",
        "is_delta",
        "is_final_only",
        "logprobs",
        "metrics",
        "num_shown_tokens",
        "prompt",
        "quiet",
        "stream_interval",
        "token_ids",
    )

    def __init__(self, prompt: _Prompt, index: int, tokenizer: Tokenizer | None, stream_interval: int):
        processed = prompt.processed
        self.prompt = prompt
        self.index = index
        #: None with disable_log_stats.
        self.metrics = processed.requests[index].metrics
        self.detokenizer = make_detokenizer(tokenizer, processed.prompt_token_ids, processed.params)
        self.token_ids = self.detokenizer.token_ids
        #: Tokens that the user has seen.
        self.num_shown_tokens = 0
        self.stream_interval = max(stream_interval, processed.params.stream_interval or 1)
        #: Set when the completion is finished.
        self.completion: CompletionOutput | None = None
        params = processed.params
        #: One per token; None if they were not asked for.
        self.logprobs: list[dict[int, Logprob]] | FlatLogprobs | None = None
        if params.wants_logprobs:
            self.logprobs = FlatLogprobs() if params.flat_logprobs else []
        self.cumulative_logprob = 0.0
        self.is_delta = params.output_kind is RequestOutputKind.DELTA
        self.is_final_only = params.output_kind is RequestOutputKind.FINAL_ONLY
        # Until it finishes, nothing has to happen but to collect tokens.
        asks_logprobs = params.wants_logprobs or params.prompt_logprobs is not None
        self.quiet = self.is_final_only and not params.stop and not asks_logprobs


class OutputProcessor:
    """Keeps the text side of every unfinished request."""

    def __init__(self, tokenizer: Tokenizer | None, recorder: MetricsRecorder | None = None, stream_interval: int = 1):
        """
        Args:
            tokenizer: None: texts stay empty.
            recorder: Told when tokens arrive and requests end; its `queue` has seen what `add_request` gets. None:
                nothing is recorded.
            stream_interval: Least number of tokens between two outputs of an unfinished completion, after its first.
        """
        self._tokenizer = tokenizer
        self._recorder = recorder
        self._stream_interval = stream_interval
        self._prompts: dict[str, _Prompt] = {}
        self._sequences: dict[str, _Sequence] = {}

    @property
    def num_unfinished(self) -> int:
        """Prompts with an unfinished completion."""
        return len(self._prompts)

    def request_ids(self) -> list[str]:
        """Of the prompts with an unfinished completion."""
        return list(self._prompts)

    def has_request(self, request_id: str) -> bool:
        """Whether the id, or one that its completions would get, belongs to an unfinished request."""
        return request_id in self._prompts or request_id in self._sequences

    def add_request(self, processed: ProcessedRequest) -> None:
        """Prepares for the outputs of `processed.requests`. Its ids are not in use (see `has_request`)."""
        prompt = _Prompt(processed, self._tokenizer, self._stream_interval)
        self._prompts[processed.request_id] = prompt
        for request, sequence in zip(processed.requests, prompt.sequences, strict=True):
            assert request.request_id not in self._sequences, request.request_id
            self._sequences[request.request_id] = sequence

    def abort(self, request_ids: Sequence[str]) -> list[str]:
        """Forgets requests; unknown and finished ids are ignored.

        Returns:
            Ids of the unfinished completions, which the core must abort.
        """
        to_abort: list[str] = []
        if self._recorder is not None:
            self._recorder.tick()
        for request_id in request_ids:
            if prompt := self._prompts.pop(request_id, None):
                for request in prompt.processed.requests:
                    if sequence := self._sequences.pop(request.request_id, None):
                        to_abort.append(request.request_id)
                        self._finish(sequence, "abort")
        return to_abort

    def abort_outputs(self, request_ids: Sequence[str]) -> list[EngineOutput]:
        """What ends requests with what they have so far, for `process`: one output with finish_reason "abort" for each
        unfinished completion, which the core must abort. Unknown and finished ids are ignored."""
        return [
            EngineOutput(request.request_id, [], "abort", num_cached_tokens=prompt.num_cached_tokens or 0)
            for request_id in dict.fromkeys(request_ids)
            if (prompt := self._prompts.get(request_id))
            for request in prompt.processed.requests
            if request.request_id in self._sequences
        ]

    def process(self, outputs: Sequence[EngineOutput]) -> tuple[list[RequestOutput], list[str]]:
        """Takes one step's outputs. Those of unknown (aborted) requests are ignored.

        Where a stop string ended a request, its `EngineOutput` gets finish_reason "stop" and the string as stop_reason,
        so that whoever reads the records afterwards sees how the request really ended.

        Returns:
            What is to be shown now as each request's output_kind asks, and the ids that the core must abort because a
            stop string matched while the core would have gone on.
        """
        shown: list[RequestOutput] = []
        to_abort: list[str] = []
        sequences = self._sequences
        recorder = self._recorder
        now = recorder.tick() if recorder is not None else 0.0
        previous_times: list[float] = []
        for output in outputs:
            sequence = sequences.get(output.request_id)
            if sequence is None:
                continue
            metrics = sequence.metrics
            if metrics is not None and output.new_token_ids:
                if last := metrics.last_token_ts:
                    previous_times.append(last)
                elif recorder is not None:
                    recorder.first_token(metrics)
                metrics.last_token_ts = now
            if sequence.quiet and output.finish_reason is None:
                sequence.token_ids.extend(output.new_token_ids)
                continue
            if self._update(sequence, output):
                to_abort.append(output.request_id)
            request_output = self._show(sequence, output)
            if request_output is not None:
                shown.append(request_output)
        if recorder is not None:
            recorder.tokens(previous_times)
        return shown, to_abort

    def _update(self, sequence: _Sequence, output: EngineOutput) -> bool:
        """Adds tokens; True if a stop string matched and the core does not know that the request is over."""
        prompt = sequence.prompt
        if prompt.num_cached_tokens is None or sequence.index == 0:
            prompt.num_cached_tokens = output.num_cached_tokens
        if output.prompt_logprobs is not None:
            prompt.prompt_logprobs = FlatLogprobs() if prompt.processed.params.flat_logprobs else []
            prompt.prompt_logprobs.append(None)
            for token_id, found in zip(prompt.processed.prompt_token_ids[1:], output.prompt_logprobs, strict=True):
                self._append_entry(prompt.prompt_logprobs, prompt, token_id, found)
        if sequence.logprobs is not None and output.new_logprobs is not None:
            self._add_logprobs(sequence, output)
        reason = output.finish_reason
        stop = sequence.detokenizer.update(output.new_token_ids, reason is not None, reason == "stop")
        if stop is None:
            return False
        output.finish_reason, output.stop_reason = "stop", stop
        return reason is None

    def _add_logprobs(self, sequence: _Sequence, output: EngineOutput) -> None:
        assert sequence.logprobs is not None and output.new_logprobs is not None
        for token_id, found in zip(output.new_token_ids, output.new_logprobs, strict=True):
            self._append_entry(sequence.logprobs, sequence.prompt, token_id, found)
            sequence.cumulative_logprob += found.logprob

    def _append_entry(
        self, logprobs: list[Any] | FlatLogprobs, prompt: _Prompt, token_id: int, found: SampledLogprobs
    ) -> None:
        """The token itself, the most probable ones, those that the request named."""
        ids = [token_id, *found.top_ids, *found.named_ids]
        values = [found.logprob, *found.top_logprobs, *found.named_logprobs]
        ranks = [found.rank, *range(1, len(found.top_ids) + 1), *[None] * len(found.named_ids)]
        decoded: list[str | None] = [None] * len(ids)
        tokenizer = self._tokenizer
        if tokenizer is not None and prompt.processed.params.detokenize:
            decoded = [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
        if isinstance(logprobs, FlatLogprobs):
            logprobs.append_fast(ids, values, ranks, decoded)
            return
        entry: dict[int, Logprob] = {}
        for i, value, rank, text in zip(ids, values, ranks, decoded, strict=True):
            entry.setdefault(i, Logprob(value, rank, text))
        logprobs.append(entry)

    def _show(self, sequence: _Sequence, output: EngineOutput) -> RequestOutput | None:
        prompt = sequence.prompt
        num_shown = sequence.num_shown_tokens
        if output.finish_reason is not None:
            del self._sequences[output.request_id]
            self._finish(sequence, output.finish_reason)
            if prompt.num_running == 0:
                del self._prompts[prompt.processed.request_id]
        elif sequence.is_final_only or not output.new_token_ids:
            return None
        elif 0 < num_shown and len(sequence.token_ids) - num_shown < sequence.stream_interval:
            return None
        completion = _completion(sequence, output)
        if not sequence.is_final_only:
            return _request_output(prompt, [completion])
        sequence.completion = completion
        if prompt.num_running:
            return None
        return _request_output(prompt, [s.completion for s in prompt.sequences if s.completion is not None])

    def _finish(self, sequence: _Sequence, reason: str) -> None:
        prompt = sequence.prompt
        prompt.num_running -= 1
        if self._recorder is None or sequence.metrics is None:
            return
        self._recorder.completion_finished(sequence.metrics, prompt.processed, len(sequence.token_ids), reason)
        if prompt.num_running == 0:
            self._recorder.prompt_finished([len(s.token_ids) for s in prompt.sequences])


# Outputs are made with positional arguments, which takes half the time of naming them, for each token of each request.


def _completion(sequence: _Sequence, output: EngineOutput) -> CompletionOutput:
    finished, delta = output.finish_reason is not None, sequence.is_delta
    token_ids, logprobs = sequence.token_ids, sequence.logprobs
    num_shown, sequence.num_shown_tokens = sequence.num_shown_tokens, len(token_ids)
    if logprobs is not None and len(logprobs) > len(token_ids):  # of tokens behind a stop string
        logprobs = sequence.logprobs = logprobs[: len(token_ids)]
    if delta:
        token_ids, logprobs = token_ids[num_shown:], None if logprobs is None else logprobs[num_shown:]
    elif not finished:
        # The originals go on growing.
        token_ids, logprobs = token_ids.copy(), None if logprobs is None else logprobs[:]
    return CompletionOutput(
        sequence.index,
        sequence.detokenizer.get_next_output_text(finished, delta),
        token_ids,
        None if logprobs is None else sequence.cumulative_logprob,
        logprobs,
        output.finish_reason,
        output.stop_reason,
        None,
        output.error,
    )


def _request_output(prompt: _Prompt, completions: list[CompletionOutput]) -> RequestOutput:
    processed = prompt.processed
    return RequestOutput(
        processed.request_id,
        processed.prompt,
        processed.prompt_token_ids,
        completions,
        prompt.num_running == 0,
        prompt.prompt_logprobs,
        _metrics(prompt),
        None,
        prompt.num_cached_tokens,
    )


def _metrics(prompt: _Prompt) -> RequestMetrics | None:
    """Of the completion, or of all of them together."""
    first, *others = prompt.sequences
    if first.metrics is None:
        return None
    if others:
        metrics = merged([s.metrics for s in prompt.sequences if s.metrics is not None])
        metrics.num_generation_tokens = sum(len(s.token_ids) for s in prompt.sequences)
        return metrics
    first.metrics.num_generation_tokens = len(first.token_ids)
    return first.metrics
