"""The four records that the engine's stages exchange. Read this file first.

    front end --EngineRequest--> scheduler --SchedulerOutput--> runner
    front end <--EngineOutput--- scheduler <---StepOutput------ runner

Scheduler and runner never see each other; these records are all they share. Plain Python, no jax. Requests and outputs
may cross to another process: `vjax/engine/protocol.py` names what of them does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from vjax.outputs import RequestMetrics
from vjax.sampling_params import SamplingParams

#: In `SchedulerOutput.token_ids`: the token is the one that the row sampled last, which only the device may know yet.
LAST_SAMPLED = -1

#: What becomes of the final states of a prompt's tokens: that of the last or of the first, their mean, or each of them.
POOLING_TYPES = ("LAST", "CLS", "MEAN", "ALL")


def mask_width(vocab_size: int) -> int:
    """Words of 32 bits, one bit for each token, in a mask of the tokens that may be drawn."""
    return -(-vocab_size // 32)


@dataclass(slots=True)
class EngineRequest:
    """One prompt on its way into the engine core. Already validated; n > 1 was expanded into several of these."""

    request_id: str
    prompt_token_ids: list[int]
    #: n is 1, max_tokens is a number, seed is a number (drawn by the front end when the user gave none).
    sampling_params: SamplingParams
    #: None: nothing is an end of sequence for this request (also when ignore_eos is set).
    eos_token_id: int | None
    arrival_time: float
    #: Lower runs first under the "priority" policy.
    priority: int = 0
    cache_salt: str | None = None
    #: Where the scheduler notes what it alone sees: first admission, cached tokens, preemptions. None: nobody asks.
    metrics: RequestMetrics | None = None
    #: EOS ids that ignore_eos makes ordinary tokens.
    ignored_eos_token_ids: tuple[int, ...] = ()
    #: SamplingParams.bad_words as sequences of tokens.
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    #: What the engine's logits processors keep of it (see `logits_processor.request_values`).
    processor_values: tuple[float, ...] = ()
    #: SamplingParams.structured_outputs in llguidance's language, known to be a grammar.
    grammar: str | None = None
    #: What a pooling engine makes of the prompt: one of `POOLING_TYPES`; None: the request generates.
    pooling_type: str | None = None


@dataclass(slots=True)
class RowInit:
    """State that a device row gets when a request enters it: first admission, or re-admission after preemption."""

    row: int
    num_computed_tokens: int
    #: Temperature, truncation, seed and min_tokens travel to the device from here.
    sampling_params: SamplingParams
    #: Number of prompt tokens: the position from which min_tokens counts.
    num_prompt_tokens: int
    #: Ids that min_tokens masks: EOS (with ignore_eos too) and stop_token_ids. Empty unless min_tokens > 0.
    masked_token_ids: tuple[int, ...] = ()
    #: As in `EngineRequest`.
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    processor_values: tuple[float, ...] = ()
    #: Every step in which the row samples has a mask for it.
    has_grammar: bool = False


@dataclass(slots=True)
class SchedulerOutput:
    """One step's work, in the order of the flat batch: decode sequences (one token each), then prefills that reach the
    end of what is known and so sample a token, then partial prefills. The first `num_sampled` sequences sample."""

    step_id: int
    #: Device row of each sequence (1..max_num_seqs; row 0 is the null row).
    rows: list[int] = field(default_factory=list)
    #: Tokens that each sequence computes in this step (>= 1).
    num_scheduled_tokens: list[int] = field(default_factory=list)
    #: The flat batch [sum(num_scheduled_tokens)], LAST_SAMPLED where the device knows the token.
    token_ids: list[int] = field(default_factory=list)
    #: Leading sequences with exactly one token.
    num_decodes: int = 0
    #: Leading sequences that sample a token.
    num_sampled: int = 0
    new_rows: list[RowInit] = field(default_factory=list)
    #: Block-table writes of this step: table[block_rows[i], block_columns[i]] = block_ids[i]. Applied after `new_rows`.
    block_rows: list[int] = field(default_factory=list)
    block_columns: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    #: Prompt tokens whose log probabilities are wanted: where in the flat batch the token before each of them is, and
    #: their ids.
    scored_indices: list[int] = field(default_factory=list)
    scored_token_ids: list[int] = field(default_factory=list)
    #: Most probable ids that are wanted with each of them; -1: all.
    scored_num_top: int = 0
    #: Of a pooling engine; None: it generates.
    pooled: PooledTokens | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(slots=True)
class PooledTokens:
    """Tokens of a step whose final states are wanted, by their places in the flat batch."""

    #: One vector each.
    indices: list[int] = field(default_factory=list)
    #: The sum over the tokens from `starts[i]` to before `ends[i]`, one vector each.
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


@dataclass(slots=True)
class StepOutput:
    """What the device sampled in one step, for the first `num_sampled` sequences, in their order."""

    step_id: int
    sampled_token_ids: list[int]
    #: Of all of them, when one of the requests asked for log probabilities.
    logprobs: StepLogprobs | None = None
    #: Of `SchedulerOutput.scored_token_ids`, in their order.
    scored: StepLogprobs | None = None
    #: Of `SchedulerOutput.pooled`, in its order: f32 [len(indices), width] and [len(starts), width].
    vectors: np.ndarray | None = None
    sums: np.ndarray | None = None


@dataclass(slots=True)
class StepLogprobs:
    """Log probabilities (or logits, as logprobs_mode says) of the N tokens of one step."""

    #: f32 [N].
    logprobs: np.ndarray
    #: i32 [N], from 1.
    ranks: np.ndarray
    #: i32 [N, K], the K most probable ids, most probable first.
    top_ids: np.ndarray
    #: f32 [N, K].
    top_logprobs: np.ndarray
    #: f32 [N, E], of the request's logprob_token_ids.
    named_logprobs: np.ndarray
    #: f32 [N, vocab_size], when a request asked for those of all ids.
    all_logprobs: np.ndarray | None = None

    @classmethod
    def joined(cls, parts: Sequence[StepLogprobs]) -> StepLogprobs:
        """One after the other."""
        if len(parts) == 1:
            return parts[0]
        names = ("logprobs", "ranks", "top_ids", "top_logprobs", "named_logprobs")
        joined = cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
        every = [part.all_logprobs for part in parts if part.all_logprobs is not None]
        joined.all_logprobs = np.concatenate(every) if every else None
        return joined

    def of(self, i: int, num_top: int | None, named: Sequence[int] = ()) -> SampledLogprobs:
        """What the request behind the i-th token asked for.

        Args:
            num_top: Its `logprobs` or `prompt_logprobs`.
            named: Its `logprob_token_ids`.
        """
        k = num_top or 0
        if 0 <= k <= self.top_ids.shape[1]:
            top = self.top_ids[i, :k].tolist(), self.top_logprobs[i, :k].tolist()
        else:
            assert self.all_logprobs is not None
            ids = np.argsort(-self.all_logprobs[i], kind="stable")[: k if k > 0 else None]
            top = ids.tolist(), self.all_logprobs[i, ids].tolist()
        named_logprobs = self.named_logprobs[i, : len(named)].tolist()
        return SampledLogprobs(float(self.logprobs[i]), int(self.ranks[i]), *top, list(named), named_logprobs)


@dataclass(slots=True)
class SampledLogprobs:
    """Of one token."""

    logprob: float
    rank: int
    #: The most probable ids, as many as asked for.
    top_ids: list[int]
    top_logprobs: list[float]
    #: The request's logprob_token_ids.
    named_ids: list[int]
    named_logprobs: list[float]


class EngineOutput(msgspec.Struct, array_like=True, gc=False):
    """New tokens of one request after one step."""

    request_id: str
    new_token_ids: list[int]
    #: "stop" | "length" | "repetition" | "abort" | "error" | None while running.
    finish_reason: str | None = None
    #: The stop token id, or "repetition_detected"; None for EOS, length and abort.
    stop_reason: int | str | None = None
    #: Prompt tokens that the prefix cache served at first admission.
    num_cached_tokens: int = 0
    #: Why the request failed, when finish_reason is "error".
    error: str | None = None
    #: One per new token, if asked for.
    new_logprobs: list[SampledLogprobs] | None = None
    #: With the first token: of each token of the prompt but the first, if asked for.
    prompt_logprobs: list[SampledLogprobs] | None = None
    #: With finish_reason "stop" of a pooling request: f32 [width], or [prompt tokens, width] with "ALL", before
    #: activation and normalisation.
    pooled: Any = None
