"""How a step is filled: the two passes that every policy is made of, and continuous batching, V1's policy.

There are no prefill and decode phases here: a request gets tokens so that what is computed catches up with what is
known, within one token budget (the method of vLLM's V1 scheduler; chunked prefill is that of Sarathi-Serve,
arXiv:2403.02310).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from vjax.request import Request
from vjax.scheduler.state import SchedulerState
from vjax.scheduler.step import StepBuilder


class BatchingPolicy(Protocol):
    def fill(self, state: SchedulerState, step: StepBuilder) -> None:
        """Adds to the step what should run in it."""


class ContinuousBatching:
    """Running requests first, then new ones, in every step."""

    def fill(self, state: SchedulerState, step: StepBuilder) -> None:
        schedule_running(state, step, list(state.running))
        admit_waiting(state, step, len(state.waiting))


def schedule_running(state: SchedulerState, step: StepBuilder, candidates: Iterable[Request]) -> None:
    """Gives each candidate its next tokens while the budget lasts; preempts others when blocks run out.

    Args:
        candidates: Running requests, in a collection of their own: `state.running` changes.
    """
    kv = state.kv
    block_size = kv.block_size
    for request in candidates:
        if not step.budget:
            break
        num_tokens = len(request.token_ids) + request.num_placeholders
        if num_tokens >= request.max_num_tokens:
            continue  # A step in flight ends it for certain.
        if not request.row:
            continue  # Preempted further up in this loop.
        n = num_tokens - request.num_computed_tokens
        if n > 1:
            n = min(n, step.budget, _chunk_limit(state))
        end = request.num_computed_tokens + n
        if end > len(request.block_ids) * block_size and not _grow(state, step, request, end):
            continue
        step.add(request, n)
        if n > 1 or end % block_size == 0:
            kv.note_full_blocks(request)


def admit_waiting(state: SchedulerState, step: StepBuilder, limit: int) -> int:
    """Starts waiting requests in their order while rows, blocks and budget last. Returns how many, at most `limit`.

    None starts in a step that preempted another, or while admission is off. The first one that cannot start ends the
    pass, so nobody is overtaken. A request starts only if all its known tokens fit into free blocks, though its first
    chunk may need fewer: one that stalls half-way holds blocks for nothing.
    """
    if step.preempted or not state.admits:
        return 0
    kv, waiting = state.kv, state.waiting
    admitted = 0
    while admitted < limit and waiting and state.free_rows and step.budget:
        request = waiting.peek()
        if request.num_placeholders:
            break  # Preempted while a step in flight owes it a token: its end is not known yet.
        hit_blocks, num_cached = kv.get_computed_blocks(request)
        n = request.num_tokens - num_cached
        if state.config.enable_chunked_prefill:
            n = min(n, step.budget, _chunk_limit(state))
        if n > step.budget or not kv.fits(request.num_tokens, hit_blocks):
            break
        waiting.pop()
        kv.admit(request, hit_blocks)
        state.start(request, num_cached)
        allocated = kv.allocate(request, num_cached + n)
        assert allocated, "the whole request fits, so its first tokens do"
        _note_admission(state, step, request)
        step.add(request, n)
        kv.note_full_blocks(request)
        admitted += 1
    return admitted


def _chunk_limit(state: SchedulerState) -> int:
    """Most tokens of one sequence in a step."""
    threshold = state.config.long_prefill_token_threshold
    if threshold and state.config.enable_chunked_prefill and len(state.requests) > 1:
        return threshold
    return state.config.max_num_batched_tokens


def _grow(state: SchedulerState, step: StepBuilder, request: Request, num_tokens: int) -> bool:
    """Gets a running request blocks for `num_tokens`. False: it was the one that had to be preempted."""
    first = len(request.block_ids)
    while not state.kv.allocate(request, num_tokens):
        victim = state.victim()
        step.preempted = True
        step.remove(victim)
        state.kv.take_back(victim, len(victim.block_ids))
        state.preempt(victim)
        if victim is request:
            return False
    step.grown.append((request, first))
    return True


def _note_admission(state: SchedulerState, step: StepBuilder, request: Request) -> None:
    step.admitted.append(request)
    step.grown.append((request, 0))
    if request.num_cached_tokens is None:
        step.first_admitted.append(request)
        request.num_cached_tokens = request.num_computed_tokens
        if request.metrics is not None:
            request.metrics.scheduled_ts = state.clock()
            request.metrics.num_cached_tokens = request.num_cached_tokens
        if state.kv.pool.enable_caching and request.reads_prefix_cache:
            state.stats.prefix_cache_requests += 1
            state.stats.prefix_cache_queries += request.num_tokens
            state.stats.prefix_cache_hits += request.num_cached_tokens
