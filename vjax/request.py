"""State of one request inside the engine core: what the scheduler and the KV manager read and change."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vjax.messages import EngineRequest, SampledLogprobs
from vjax.outputs import RequestMetrics
from vjax.sampling_params import SamplingParams


class RequestStatus(enum.Enum):
    WAITING_FOR_GRAMMAR = "waiting_for_grammar"
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One sequence of tokens that the engine extends.

    `token_ids` holds what the host knows: prompt, then sampled tokens that have arrived. `num_placeholders` counts
    tokens that dispatched steps will still deliver. `num_computed_tokens` counts tokens whose KV is written once every
    dispatched step is done.

        0 ........ num_computed_tokens ........ len(token_ids) .... len(token_ids) + num_placeholders
        |  KV written or in flight  | to be computed            | known to the device alone |
    """

    request_id: str
    sampling_params: SamplingParams
    num_prompt_tokens: int
    token_ids: list[int]
    eos_token_id: int | None
    arrival_time: float
    priority: int = 0
    cache_salt: str | None = None
    #: Length at which the request ends: prompt plus max_tokens, at most max_model_len.
    max_num_tokens: int = 0
    #: EOS and stop_token_ids: the tokens that end it.
    stop_ids: frozenset[int] = frozenset()
    #: EOS ids that do not end it, since ignore_eos is set; min_tokens masks them all the same.
    ignored_eos_token_ids: tuple[int, ...] = ()
    #: From this length on every new token may end it: `max_num_tokens`, or less with repetition detection.
    check_num_tokens: int = 0
    #: Position in the order of arrival: breaks ties of priority and arrival time.
    sequence_number: int = 0

    status: RequestStatus = RequestStatus.WAITING
    num_computed_tokens: int = 0
    num_placeholders: int = 0
    #: Tokens known at the latest admission: its prefill lasts until so many are computed.
    num_prefill_tokens: int = 0
    #: Device row while RUNNING, else 0 (the null row).
    row: int = 0
    #: Blocks held, in order of position.
    block_ids: list[int] = field(default_factory=list)
    #: Chained hashes of the full blocks of `token_ids` known so far (see vjax/kv/hashing.py).
    block_hashes: list[bytes] = field(default_factory=list)
    #: Leading blocks of `block_ids` that are registered in the prefix cache.
    num_hashed_blocks: int = 0
    #: Prefix-cache tokens at first admission; None until then.
    num_cached_tokens: int | None = None
    num_preemptions: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    #: SamplingParams.bad_words as sequences of tokens.
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    #: As in `EngineRequest`.
    processor_values: tuple[float, ...] = ()
    #: Whether each token comes with log probabilities.
    wants_logprobs: bool = False
    #: Log probabilities of the prompt's tokens from the second one on, as far as they have arrived; None: nobody asked.
    prompt_logprobs: list[SampledLogprobs] | None = None
    #: Prompt tokens, with the first one, whose log probabilities have arrived or will with a dispatched step.
    num_scored_tokens: int = 1
    #: One of `messages.POOLING_TYPES`; None: it generates.
    pooling_type: str | None = None
    #: Of a pooling request: what has arrived of its tokens' final states, or of their sums with "MEAN".
    pooled_parts: list[np.ndarray] = field(default_factory=list)
    #: Up to here the prompt's states have arrived, will with a dispatched step, or are not wanted.
    num_pooled_tokens: int = 0
    #: From here on they are not wanted.
    pooled_end: int = 0
    #: The front end's record of it; None with disable_log_stats.
    metrics: RequestMetrics | None = None
    #: Its place in its grammar, which follows `token_ids`, released at its end; None: it has no grammar. The engine
    #: core's.
    matcher: Any = None

    @classmethod
    def from_engine_request(cls, r: EngineRequest, max_model_len: int, matcher: Any = None) -> Request:
        params, num_prompt_tokens = r.sampling_params, len(r.prompt_token_ids)
        assert params.max_tokens is not None
        eos = () if r.eos_token_id is None else (r.eos_token_id,)
        max_num_tokens = min(num_prompt_tokens + params.max_tokens, max_model_len)
        check_num_tokens, repetition = max_num_tokens, params.repetition_detection
        if repetition is not None and repetition.is_on:
            first = num_prompt_tokens + max(repetition.min_num_tokens, params.min_tokens)
            check_num_tokens = min(first, max_num_tokens)
        pooled = _pooled_range(r.pooling_type, num_prompt_tokens)
        if r.pooling_type is not None:  # Its end stands for one token that never comes.
            max_num_tokens = num_prompt_tokens + 1
        return cls(
            request_id=r.request_id,
            sampling_params=params,
            num_prompt_tokens=num_prompt_tokens,
            token_ids=list(r.prompt_token_ids),
            eos_token_id=r.eos_token_id,
            arrival_time=r.arrival_time,
            priority=r.priority,
            cache_salt=r.cache_salt,
            metrics=r.metrics,
            matcher=matcher,
            bad_words_token_ids=r.bad_words_token_ids,
            processor_values=r.processor_values,
            wants_logprobs=r.sampling_params.wants_logprobs,
            prompt_logprobs=None if r.sampling_params.prompt_logprobs is None else [],
            max_num_tokens=max_num_tokens,
            stop_ids=params.all_stop_token_ids.union(eos),
            ignored_eos_token_ids=r.ignored_eos_token_ids,
            pooling_type=r.pooling_type,
            num_pooled_tokens=pooled[0],
            pooled_end=pooled[1],
            check_num_tokens=check_num_tokens,
        )

    @property
    def reads_prefix_cache(self) -> bool:
        return self.sampling_params.reads_prefix_cache

    @property
    def num_tokens(self) -> int:
        """Tokens that the host knows."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED


def _pooled_range(pooling_type: str | None, num_prompt_tokens: int) -> tuple[int, int]:
    """The tokens of a prompt whose final states are wanted: from, and up to."""
    if pooling_type is None:
        return 0, 0
    return num_prompt_tokens - 1 if pooling_type == "LAST" else 0, 1 if pooling_type == "CLS" else num_prompt_tokens
