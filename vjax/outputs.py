"""What the engine hands back: one `RequestOutput` per prompt, with one `CompletionOutput` per completion; of a model
that pools one `PoolingRequestOutput` per prompt; and, to who records steps, one `StepRecord` per step."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import numpy as np

from vjax.logprobs import FlatLogprobs, Logprob

FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")


@dataclass(slots=True)
class RequestMetrics:
    """Times and counts of one request; collected unless `disable_log_stats` is set. With n > 1 of its completions
    together: the first of them to be scheduled, the first token of any, the last token of all.

    `arrival_time` is wall time (seconds since the epoch), the `*_ts` are seconds of one monotonic clock, 0 until they
    happen, and `first_token_latency` is seconds from arrival: vLLM's RequestStateStats. The properties, None until what
    they need has happened, are the durations of its FinishedRequestStats and the wall times of V0's RequestMetrics.
    """

    num_generation_tokens: int = 0
    #: Prompt tokens that the prefix cache served when the request was first scheduled.
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    arrival_time: float = 0.0
    arrival_ts: float = 0.0
    #: The engine accepted it.
    queued_ts: float = 0.0
    #: It was scheduled for the first time.
    scheduled_ts: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    finished_ts: float = 0.0
    first_token_latency: float = 0.0

    @property
    def queued_time(self) -> float | None:
        """Seconds from accepted to scheduled."""
        return _between(self.queued_ts, self.scheduled_ts)

    @property
    def prefill_time(self) -> float | None:
        """Seconds from scheduled to the first token, preemptions included."""
        return _between(self.scheduled_ts, self.first_token_ts)

    @property
    def decode_time(self) -> float | None:
        """Seconds from the first token to the last so far, preemptions included."""
        return _between(self.first_token_ts, self.last_token_ts)

    @property
    def inference_time(self) -> float | None:
        """Seconds from scheduled to the last token so far."""
        return _between(self.scheduled_ts, self.last_token_ts)

    @property
    def e2e_latency(self) -> float | None:
        """Seconds from arrival to the end."""
        return _between(self.arrival_ts, self.finished_ts)

    @property
    def mean_time_per_output_token(self) -> float | None:
        """`decode_time` over the tokens after the first; 0 where there are none, as in vLLM."""
        decode_time = self.decode_time
        if decode_time is None:
            return None
        return decode_time / (self.num_generation_tokens - 1) if self.num_generation_tokens > 1 else 0.0

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from arrival to scheduled."""
        return _between(self.arrival_ts, self.scheduled_ts)

    @property
    def first_scheduled_time(self) -> float | None:
        return self._wall_time(self.scheduled_ts)

    @property
    def first_token_time(self) -> float | None:
        return self._wall_time(self.first_token_ts)

    @property
    def last_token_time(self) -> float | None:
        return self._wall_time(self.last_token_ts)

    @property
    def finished_time(self) -> float | None:
        return self._wall_time(self.finished_ts)

    def _wall_time(self, ts: float) -> float | None:
        return self.arrival_time + ts - self.arrival_ts if ts else None


def _between(start: float, end: float) -> float | None:
    return end - start if start and end else None


@dataclass(slots=True, repr=False)
class CompletionOutput:
    """One completion, or with `RequestOutputKind.DELTA` what is new in it."""

    #: Which of the prompt's `n` completions, from 0.
    index: int
    #: Without special tokens, stop strings and stop tokens, unless the sampling parameters ask for them.
    text: str
    #: Sampled ids, with the EOS or stop token that ended the completion.
    token_ids: list[int]
    #: Sum of the sampled tokens' log probabilities; None unless `logprobs` was asked for.
    cumulative_logprob: float | None = None
    #: Per token: token id -> log probability, the token itself first, then the most probable ones, then those of
    #: `logprob_token_ids`; None unless asked for.
    logprobs: list[dict[int, Logprob]] | FlatLogprobs | None = None
    #: One of FINISH_REASONS, None while the completion goes on.
    finish_reason: str | None = None
    #: The stop string or stop token id that matched, "repetition_detected" for repetition; None for EOS, length, abort
    #: and error.
    stop_reason: int | str | None = None
    lora_request: Any = None
    #: Why the completion failed, when finish_reason is "error".
    error: str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None

    def __repr__(self) -> str:
        parts = [f"index={self.index}", f"text={self.text!r}", f"token_ids={_short(self.token_ids)}"]
        if self.cumulative_logprob is not None:
            parts.append(f"cumulative_logprob={self.cumulative_logprob:.4f}")
        parts.append(f"finish_reason={self.finish_reason!r}")
        if self.stop_reason is not None:
            parts.append(f"stop_reason={self.stop_reason!r}")
        if self.error is not None:
            parts.append(f"error={self.error!r}")
        return f"CompletionOutput({', '.join(parts)})"


@dataclass(slots=True, repr=False)
class RequestOutput:
    """A prompt and its completions."""

    request_id: str
    #: None where the prompt was given as token ids.
    prompt: str | None
    prompt_token_ids: list[int]
    #: Ordered by `index`.
    outputs: list[CompletionOutput]
    #: All completions are finished.
    finished: bool
    #: As `logprobs`, of the prompt's tokens; there is none for the first.
    prompt_logprobs: list[dict[int, Logprob] | None] | FlatLogprobs | None = None
    metrics: RequestMetrics | None = None
    lora_request: Any = None
    #: Prompt tokens whose KV came from the prefix cache at first admission; None until then.
    num_cached_tokens: int | None = None

    def __repr__(self) -> str:
        parts = [
            f"request_id={self.request_id!r}",
            f"prompt={self.prompt!r}",
            f"prompt_token_ids={_short(self.prompt_token_ids)}",
            f"outputs={self.outputs!r}",
            f"finished={self.finished}",
            f"num_cached_tokens={self.num_cached_tokens}",
        ]
        return f"RequestOutput({', '.join(parts)})"


@dataclass(frozen=True, slots=True)
class RequestStep:
    """A running request in one step, as it was scheduled."""

    request_id: str
    num_prompt_tokens: int
    #: Tokens that it computes in this step; 0 where it waits for its turn.
    num_tokens: int
    #: Its tokens whose KV is in the cache once this step is done.
    num_computed_tokens: int
    #: Its prompt tokens that the prefix cache had when it was first admitted.
    num_cached_tokens: int
    #: Its block table: the KV blocks that it holds, in order of position.
    block_ids: tuple[int, ...]

    @property
    def num_prefill_tokens(self) -> int:
        """Those of `num_tokens` that are of the prompt."""
        return max(0, min(self.num_tokens, self.num_prompt_tokens - (self.num_computed_tokens - self.num_tokens)))


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step was given to do, and what the scheduler's books said then; see `record_steps` of the engine."""

    step_id: int
    #: Every running request: those of the step in the order of its batch, then those that wait for their turn.
    requests: tuple[RequestStep, ...]
    num_waiting: int
    #: Blocks whose content the prefix cache can find, whether or not a request holds them.
    cached_block_ids: frozenset[int]

    def counts(self) -> dict[str, int]:
        """Tokens and requests: "prefill_tokens", "decode_tokens", "running" and "waiting"."""
        prefill = sum(request.num_prefill_tokens for request in self.requests)
        return {
            "prefill_tokens": prefill,
            "decode_tokens": sum(request.num_tokens for request in self.requests) - prefill,
            "running": len(self.requests),
            "waiting": self.num_waiting,
        }


def _short(token_ids: list[int], limit: int = 16) -> str:
    """The list, or its first `limit` entries and its length."""
    if len(token_ids) <= limit:
        return str(list(token_ids))
    return f"[{', '.join(map(str, token_ids[:limit]))}, ... {len(token_ids)} in all]"


@dataclass(slots=True)
class PoolingOutput:
    """What `LLM.encode` gives for a prompt."""

    #: f32 [width] of tasks on a prompt, [tokens, width] of tasks on tokens; [0] where the request failed.
    data: np.ndarray


@dataclass(slots=True)
class EmbeddingOutput:
    """What `LLM.embed` gives for a prompt."""

    #: Empty where the request failed.
    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(slots=True)
class ClassificationOutput:
    """What `LLM.classify` gives for a prompt."""

    #: One per label: probabilities, or with use_activation=False logits. Empty where the request failed.
    probs: list[float]

    @property
    def num_classes(self) -> int:
        return len(self.probs)


@dataclass(slots=True)
class ScoringOutput:
    """What `LLM.score` gives for a pair."""

    #: NaN where the request failed.
    score: float


PooledOutput = TypeVar("PooledOutput", PoolingOutput, EmbeddingOutput, ClassificationOutput, ScoringOutput)


@dataclass(slots=True)
class PoolingRequestOutput(Generic[PooledOutput]):
    """A prompt and what a model that pools gave for it."""

    request_id: str
    outputs: PooledOutput
    prompt_token_ids: list[int]
    #: Prompt tokens whose KV came from the prefix cache.
    num_cached_tokens: int
    finished: bool
    #: Why there is nothing: "abort", or what failed on the device. None: all is well.
    error: str | None = None
    metrics: RequestMetrics | None = None


class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    """Of `LLM.embed`."""

    @staticmethod
    def from_base(output: PoolingRequestOutput[PoolingOutput]) -> EmbeddingRequestOutput:
        return EmbeddingRequestOutput(**_shared(output), outputs=EmbeddingOutput(output.outputs.data.tolist()))


class ClassificationRequestOutput(PoolingRequestOutput[ClassificationOutput]):
    """Of `LLM.classify`."""

    @staticmethod
    def from_base(output: PoolingRequestOutput[PoolingOutput]) -> ClassificationRequestOutput:
        return ClassificationRequestOutput(
            **_shared(output), outputs=ClassificationOutput(output.outputs.data.tolist())
        )


class ScoringRequestOutput(PoolingRequestOutput[ScoringOutput]):
    """Of `LLM.score`."""

    @staticmethod
    def from_base(output: PoolingRequestOutput[PoolingOutput]) -> ScoringRequestOutput:
        data = output.outputs.data
        return ScoringRequestOutput(**_shared(output), outputs=ScoringOutput(float(data[0]) if data.size else math.nan))


def _shared(output: PoolingRequestOutput[Any]) -> dict[str, Any]:
    return {f.name: getattr(output, f.name) for f in fields(output) if f.name != "outputs"}
