"""Arguments of the scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SchedulingPolicy = Literal["fcfs", "priority"]


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """What may run in one step. Plain values: `EngineArgs.resolve` validates them."""

    #: Sequences that run at the same time: the number of device rows, the null row excluded.
    max_num_seqs: int
    #: Token budget of a step. At least `max_num_seqs`, and at least `max_model_len` without chunked prefill.
    max_num_batched_tokens: int
    #: Prompt and output tokens of one sequence.
    max_model_len: int
    #: Split prompts over steps to fill the budget exactly; else a prompt is computed in one step.
    enable_chunked_prefill: bool = True
    #: With chunked prefill: most tokens of one sequence in a step that others want a share of; 0 is no limit.
    long_prefill_token_threshold: int = 0
    #: "fcfs": order of arrival. "priority": lowest `priority` first, ties by arrival time.
    policy: SchedulingPolicy = "fcfs"
    #: The engine dispatches step N+1 before the tokens of step N are on the host.
    async_scheduling: bool = True
    #: V0: one batch is prefilled, then decoded until all of it is done; then the next one is admitted.
    static_batch: bool = False
    #: Prompts are pooled: a request ends with its last prompt token, and nothing is sampled.
    pools: bool = False
