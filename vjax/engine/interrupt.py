"""Keeps Ctrl-C out of the moments at which device state changes hands."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class DeferInterrupt:
    """Context manager: SIGINT during the block takes effect when the block is left.

    A KeyboardInterrupt between the dispatch of a step and the assignment of the arrays that it returns would lose a
    donated KV cache. Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self._previous: Any = None
        self._pending: tuple[int, FrameType | None] | None = None
        self._armed = False

    def __enter__(self) -> DeferInterrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.getsignal(signal.SIGINT)
            if callable(self._previous):
                signal.signal(signal.SIGINT, self._remember)
                self._armed = True
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._pending = (number, frame)

    def __exit__(self, *exc: object) -> None:
        if not self._armed:
            return
        signal.signal(signal.SIGINT, self._previous)
        self._armed = False
        if self._pending is not None:
            number, frame = self._pending
            self._pending = None
            self._previous(number, frame)
