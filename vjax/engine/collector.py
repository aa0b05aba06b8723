"""Where the outputs of one request wait for its consumer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from typing import Any

from vjax.outputs import CompletionOutput, PoolingRequestOutput, RequestOutput


class OutputCollector:
    """Holds at most one output: those that come before the consumer takes it are merged into it, so that a slow
    consumer costs no more than its text.

    The engine's thread puts, one task of `loop` takes.
    """

    __slots__ = ("_delta", "_lock", "_pending", "_waiter", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, *, delta: bool):
        """
        Args:
            delta: Outputs hold what is new; otherwise a later one holds all that an earlier one did.
        """
        self.loop = loop
        self._delta = delta
        self._pending: RequestOutput | PoolingRequestOutput[Any] | BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._lock = threading.Lock()

    def put(self, output: RequestOutput | PoolingRequestOutput[Any] | BaseException) -> asyncio.Future[None] | None:
        """Adds an output; an exception takes the place of what waits.

        Returns:
            What the consumer waits for, to be handed to `wake` in its loop.
        """
        with self._lock:
            pending = self._pending
            if isinstance(pending, RequestOutput) and isinstance(output, RequestOutput):
                output = _merge(pending, output, self._delta)
            self._pending = output
            waiter, self._waiter = self._waiter, None
        return waiter

    async def get(self) -> Any:
        """What has come since the last call; waits for it.

        Raises:
            The exception that was put.
        """
        while True:
            with self._lock:
                output, self._pending = self._pending, None
                waiter = self._waiter = self.loop.create_future() if output is None else None
            if isinstance(output, BaseException):
                raise output
            if output is not None:
                return output
            assert waiter is not None
            await waiter


def wake(waiters: Iterable[asyncio.Future[None]]) -> None:
    """Lets consumers go on. To be called in their loop."""
    for waiter in waiters:
        if not waiter.done():  # cancelled
            waiter.set_result(None)


def _merge(old: RequestOutput, new: RequestOutput, delta: bool) -> RequestOutput:
    """One output for two of the same request, of which nobody has seen the first."""
    completions = {completion.index: completion for completion in old.outputs}
    for completion in new.outputs:
        earlier = completions.get(completion.index)
        completions[completion.index] = _join(earlier, completion) if delta and earlier else completion
    new.outputs = [completions[index] for index in sorted(completions)]
    if new.prompt_logprobs is None:
        new.prompt_logprobs = old.prompt_logprobs
    return new


def _join(old: CompletionOutput, new: CompletionOutput) -> CompletionOutput:
    """Two deltas in a row, as one."""
    new.text = old.text + new.text
    old.token_ids.extend(new.token_ids)
    new.token_ids = old.token_ids
    if old.logprobs is not None and new.logprobs is not None:
        old.logprobs.extend(new.logprobs)
        new.logprobs = old.logprobs
    return new
