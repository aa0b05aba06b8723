"""Grammars that are compiled beside the engine, which goes on meanwhile: a JSON schema may take a second."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from vjax.request import Request
from vjax.structured.compiler import GrammarCompiler
from vjax.structured.matcher import GrammarMatcher

#: Grammars that are compiled at the same time; llguidance needs no GIL for it.
_MAX_THREADS = 4


class Compilations:
    """Requests and the grammars that they wait for. One thread, the engine's, calls everything here.

    Args:
        compiler: None: there are no grammars.

    Attributes:
        on_done: Called in another thread each time when `take` has something to give.
    """

    def __init__(self, compiler: GrammarCompiler | None):
        self._compiler = compiler
        self.on_done: Callable[[], None] = lambda: None
        self._threads = ThreadPoolExecutor(min(_MAX_THREADS, ((os.cpu_count() or 1) + 1) // 2), "vjax-grammar")
        self._waiting: dict[str, list[Request]] = {}
        self._done: queue.SimpleQueue[tuple[str, GrammarMatcher | Exception]] = queue.SimpleQueue()

    def __len__(self) -> int:
        """Grammars that somebody waited for when they were begun, and that `take` has not given."""
        return len(self._waiting)

    @property
    def has_done(self) -> bool:
        """Whether `take` has something to give."""
        return not self._done.empty()

    def begin(self, grammar: str, request: Request) -> None:
        """Compiles a grammar for a request."""
        if (waiting := self._waiting.get(grammar)) is not None:
            waiting.append(request)
            return
        self._waiting[grammar] = [request]
        self._threads.submit(self._compile, grammar)

    def take(self, *, wait: bool) -> Iterator[tuple[Request, GrammarMatcher | Exception]]:
        """Requests, finished ones too, each with a matcher of its own, or with why there is none.

        Args:
            wait: For the first of them.
        """
        while wait or self.has_done:
            grammar, matcher = self._done.get()
            wait = False
            for request in self._waiting.pop(grammar):
                yield request, matcher if isinstance(matcher, Exception) else matcher.copy()

    def shutdown(self) -> None:
        """What is being compiled is compiled to its end, for nobody."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: str) -> None:
        assert self._compiler is not None
        try:
            matcher = self._compiler.matcher(grammar)
        except Exception as e:  # whatever it is: its requests fail alone
            matcher = e
        self._done.put((grammar, matcher))
        self.on_done()
