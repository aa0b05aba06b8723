"""One step while it is being put together, and what is remembered of it until its tokens arrive."""

from __future__ import annotations

from dataclasses import dataclass, field

from vjax.messages import LAST_SAMPLED, RowInit, SchedulerOutput
from vjax.request import Request


@dataclass(slots=True)
class InFlightStep:
    """A scheduled step whose output has not arrived. It holds requests, not ids: an id may be used again."""

    #: In the order of `SchedulerOutput.rows`.
    requests: list[Request]
    num_sampled: int
    #: Requests that got blocks, with the first new column of their block tables.
    grown: list[tuple[Request, int]]
    #: Requests that got a row.
    admitted: list[Request]
    #: Those of `admitted` that never had one before.
    first_admitted: list[Request]
    #: Requests of whose prompt tokens are scored, with the position of the first of them and how many, in the order of
    #: `SchedulerOutput.scored_token_ids`.
    scored: list[tuple[Request, int, int]]
    #: Requests of which prompt tokens are pooled, with the position of the first of them and how many, in the order of
    #: `SchedulerOutput.pooled`.
    pooled: list[tuple[Request, int, int]] = field(default_factory=list)

    def sampling_requests(self) -> list[Request]:
        return self.requests[: self.num_sampled]

    def drop(self) -> None:
        """The step's tokens, when they arrive, belong to nobody."""
        self.unscore()
        self.requests, self.num_sampled = [], 0

    def unscore(self) -> None:
        """Log probabilities and states of prompt tokens do not arrive either: they are to be computed again."""
        for request, first, _ in self.scored:
            request.num_scored_tokens = min(request.num_scored_tokens, first)
        for request, first, _ in self.pooled:
            request.num_pooled_tokens = min(request.num_pooled_tokens, first)
        self.scored, self.pooled = [], []


class StepBuilder:
    """Collects the sequences of a step in the three groups of `SchedulerOutput`.

    A request's counters move when it is added: a request that is added is, for everything scheduled later, as far as
    the device will be once this step is done.
    """

    def __init__(self, budget: int):
        #: Tokens that the step may still take.
        self.budget = budget
        self.decodes: list[Request] = []
        self.prefills: list[Request] = []
        self.partials: list[Request] = []
        #: Number of tokens of each request in `prefills` and `partials`; it is 1 in `decodes`.
        self.chunks: dict[Request, int] = {}
        self.grown: list[tuple[Request, int]] = []
        self.admitted: list[Request] = []
        self.first_admitted: list[Request] = []
        #: Whether a request lost its blocks for this step.
        self.preempted = False

    @property
    def is_empty(self) -> bool:
        return not (self.decodes or self.chunks)

    def add(self, request: Request, n: int) -> None:
        """Schedules the next `n` tokens; a request that thereby reaches its end samples a token."""
        self.budget -= n
        computed = request.num_computed_tokens + n
        request.num_computed_tokens = computed
        samples = computed == len(request.token_ids) + request.num_placeholders
        if samples:
            request.num_placeholders += 1
            if n == 1:
                self.decodes.append(request)
                return
        self.chunks[request] = n
        (self.prefills if samples else self.partials).append(request)

    def remove(self, request: Request) -> None:
        """Takes back `add`, if it was called for this request."""
        for group in (self.decodes, self.prefills, self.partials):
            if request in group:
                group.remove(request)
                n = self.chunks.pop(request, 1)
                self.budget += n
                request.num_computed_tokens -= n
                request.num_placeholders -= group is not self.partials
                return

    def build(self, step_id: int) -> tuple[SchedulerOutput, InFlightStep]:
        decodes, chunked = self.decodes, self.prefills + self.partials
        requests = decodes + chunked
        # A decode's only placeholder is the token that it is about to sample, unless the one that it reads is one too.
        token_ids = [r.token_ids[-1] if r.num_placeholders == 1 else LAST_SAMPLED for r in decodes]
        counts = [self.chunks[request] for request in chunked]
        for request, n in zip(chunked, counts, strict=True):
            token_ids += request.token_ids[request.num_computed_tokens - n : request.num_computed_tokens]
        scheduled = SchedulerOutput(
            step_id=step_id,
            rows=[request.row for request in requests],
            num_scheduled_tokens=[1] * len(decodes) + counts,
            token_ids=token_ids,
            num_decodes=len(decodes),
            num_sampled=len(decodes) + len(self.prefills),
            new_rows=[self._row_init(request) for request in self.admitted],
        )
        for request, first in self.grown:  # One that was preempted later in this step holds no blocks any more.
            blocks = request.block_ids[first:]
            scheduled.block_rows += [request.row] * len(blocks)
            scheduled.block_columns += range(first, first + len(blocks))
            scheduled.block_ids += blocks
        scored = self._score_prompts(scheduled, len(decodes), chunked, counts)
        step = InFlightStep(requests, scheduled.num_sampled, self.grown, self.admitted, self.first_admitted, scored)
        return scheduled, step

    @staticmethod
    def _score_prompts(
        scheduled: SchedulerOutput, index: int, chunked: list[Request], counts: list[int]
    ) -> list[tuple[Request, int, int]]:
        """Asks for the log probabilities of prompt tokens that the step's chunks make known.

        Args:
            index: Where in the flat batch the chunks begin.
        """
        scored = []
        for request, n in zip(chunked, counts, strict=True):
            if request.prompt_logprobs is not None:
                start = request.num_computed_tokens - n
                # A token's logits are those of the position before it.
                first = max(start + 1, request.num_scored_tokens)
                end = min(request.num_computed_tokens + 1, request.num_prompt_tokens)
                if first < end:
                    scheduled.scored_indices += range(index + first - 1 - start, index + end - 1 - start)
                    scheduled.scored_token_ids += request.token_ids[first:end]
                    request.num_scored_tokens = end
                    num_top = request.sampling_params.prompt_logprobs or 0
                    asked = (num_top, scheduled.scored_num_top)
                    scheduled.scored_num_top = -1 if -1 in asked else max(asked)
                    scored.append((request, first, end - first))
            index += n
        return scored

    def _row_init(self, request: Request) -> RowInit:
        params = request.sampling_params
        masked = request.stop_ids.union(request.ignored_eos_token_ids) if params.min_tokens else ()
        return RowInit(
            row=request.row,
            num_computed_tokens=request.num_computed_tokens - self.chunks.get(request, 1),
            sampling_params=params,
            num_prompt_tokens=request.num_prompt_tokens,
            masked_token_ids=tuple(sorted(masked)),
            bad_words_token_ids=request.bad_words_token_ids,
            processor_values=request.processor_values,
            has_grammar=request.matcher is not None,
        )
