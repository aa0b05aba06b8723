"""Requests that wait for admission, in the order in which they will be admitted."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from typing import Protocol

from vjax.request import Request


class RequestQueue(Protocol):
    def add(self, request: Request) -> None:
        """A new request."""

    def put_back(self, request: Request) -> None:
        """A request that was admitted before: it goes ahead of its equals."""

    def peek(self) -> Request:
        """The request to admit next; the queue must not be empty."""
        ...

    def pop(self) -> Request: ...

    def drop_finished(self) -> None:
        """Removes requests that finished while they waited, in one pass."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]:
        """In no particular order."""
        ...


class FCFSQueue:
    """First come, first served; a request that is put back goes to the front."""

    def __init__(self) -> None:
        self._queue: deque[Request] = deque()

    def add(self, request: Request) -> None:
        self._queue.append(request)

    def put_back(self, request: Request) -> None:
        self._queue.appendleft(request)

    def peek(self) -> Request:
        return self._queue[0]

    def pop(self) -> Request:
        return self._queue.popleft()

    def drop_finished(self) -> None:
        self._queue = deque(r for r in self._queue if not r.is_finished)

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._queue)


def priority_key(request: Request) -> tuple[int, float, int]:
    """Smallest first: lowest priority value, then earliest arrival, then order of arrival in the scheduler."""
    return request.priority, request.arrival_time, request.sequence_number


class PriorityQueue:
    """Smallest `priority_key` first, a heap; a request that is put back finds its place by its key."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, float, int], Request]] = []

    def add(self, request: Request) -> None:
        heapq.heappush(self._heap, (priority_key(request), request))

    def put_back(self, request: Request) -> None:
        self.add(request)

    def peek(self) -> Request:
        return self._heap[0][1]

    def pop(self) -> Request:
        return heapq.heappop(self._heap)[1]

    def drop_finished(self) -> None:
        self._heap = [entry for entry in self._heap if not entry[1].is_finished]
        heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Request]:
        return (request for _, request in self._heap)
