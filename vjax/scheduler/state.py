"""Where every request is, and the moves between the places: blocked, waiting, running (with a row and blocks),
finished."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from vjax.config.cache import CacheConfig
from vjax.config.scheduler import SchedulerConfig
from vjax.kv.manager import KVCacheManager
from vjax.request import Request, RequestStatus
from vjax.scheduler.queue import FCFSQueue, PriorityQueue, RequestQueue, priority_key
from vjax.scheduler.stats import SchedulerStats
from vjax.scheduler.step import InFlightStep


class SchedulerState:
    """Live requests, the resources that they hold, and the steps in flight.

    A running request has a device row and blocks; a waiting one has neither, though steps in flight may still owe it
    tokens. A blocked one is not in the queue yet: its grammar is being compiled. Steps execute in order, so what a
    request held can be given away at once, whatever is in flight.
    """

    def __init__(self, config: SchedulerConfig, cache: CacheConfig, clock: Callable[[], float] = time.monotonic):
        self.config = config
        self.clock = clock
        self.kv = KVCacheManager(cache.num_gpu_blocks, cache.block_size, cache.enable_prefix_caching)
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []
        self.blocked: set[Request] = set()
        self.waiting: RequestQueue = PriorityQueue() if config.policy == "priority" else FCFSQueue()
        #: Taken from the end: low rows first.
        self.free_rows = list(range(config.max_num_seqs, 0, -1))
        #: By step id, in order of execution.
        self.in_flight: dict[int, InFlightStep] = {}
        self.stats = SchedulerStats()
        #: False: what waits goes on waiting.
        self.admits = True
        #: Live requests with a matcher.
        self.num_constrained = 0

    def unblock(self, request: Request, matcher: Any) -> None:
        """Blocked to waiting, behind those that wait already."""
        self.blocked.remove(request)
        request.status = RequestStatus.WAITING
        request.matcher = matcher
        self.num_constrained += 1
        self.waiting.add(request)

    def start(self, request: Request, num_cached_tokens: int) -> None:
        """Waiting (and already popped from the queue) to running; its cached blocks are held already."""
        request.status = RequestStatus.RUNNING
        request.row = self.free_rows.pop()
        request.num_computed_tokens = num_cached_tokens
        request.num_prefill_tokens = request.num_tokens
        self.running.append(request)

    def preempt(self, request: Request) -> None:
        """Running to waiting: its KV is given up, to be computed again; its tokens stay."""
        request.num_preemptions += 1
        self.stats.num_preemptions += 1
        if request.metrics is not None:
            request.metrics.num_preemptions = request.num_preemptions
        self.stop(request)

    def stop(self, request: Request) -> None:
        """Running to waiting, ahead of its equals."""
        self._release(request)
        if self.running[-1] is request:
            self.running.pop()
        else:
            self.running.remove(request)
        request.num_computed_tokens = 0
        request.status = RequestStatus.PREEMPTED if request.num_preemptions else RequestStatus.WAITING
        self.waiting.put_back(request)

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """From anywhere to finished. `drop_finished` must follow."""
        if request.row:
            self._release(request)
        elif request.status is RequestStatus.WAITING_FOR_GRAMMAR:
            self.blocked.remove(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason
        del self.requests[request.request_id]
        if request.matcher is not None:
            request.matcher.release()
            self.num_constrained -= 1

    def drop_finished(self) -> None:
        """Removes finished requests from where they ran or waited, in one pass."""
        self.running = [request for request in self.running if request.row]
        if len(self.running) + len(self.waiting) + len(self.blocked) != len(self.requests):
            self.waiting.drop_finished()

    def victim(self) -> Request:
        """The running request to preempt next."""
        if self.config.policy == "priority":
            return max(self.running, key=priority_key)
        return self.running[-1]

    def _release(self, request: Request) -> None:
        self.kv.free(request)
        self.free_rows.append(request.row)
        request.row = 0

    def check_integrity(self) -> None:
        """Asserts everything that must hold between any two calls of the scheduler."""
        running, waiting, blocked = self.running, list(self.waiting), list(self.blocked)
        live = {id(request) for request in running + waiting + blocked}
        assert len(live) == len(running) + len(waiting) + len(blocked), "a request is in two places"
        assert live == {id(request) for request in self.requests.values()}, "a live request is nowhere"
        assert all(request.request_id == key for key, request in self.requests.items())

        assert self.num_constrained == sum(request.matcher is not None for request in self.requests.values())

        rows = [request.row for request in running]
        assert sorted(rows + self.free_rows) == list(range(1, self.config.max_num_seqs + 1)), "rows are lost or shared"
        owed = Counter(id(r) for step in self.in_flight.values() for r in step.sampling_requests())
        for request in running + waiting + blocked:
            is_running = request.row > 0
            assert (request.status is RequestStatus.WAITING_FOR_GRAMMAR) == (request in self.blocked)
            assert (request.status is RequestStatus.RUNNING) == is_running
            assert is_running or not (request.block_ids or request.num_computed_tokens), "a waiting request holds KV"
            assert request.num_placeholders == owed[id(request)], "placeholders differ from the tokens in flight"
            num_tokens = request.num_tokens + request.num_placeholders
            assert num_tokens <= request.max_num_tokens and request.num_tokens < request.max_num_tokens
            assert request.num_computed_tokens < num_tokens, "nothing is left to compute"
        self.kv.check_integrity(running)
