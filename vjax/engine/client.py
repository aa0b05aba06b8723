"""How a front end reaches an engine core that it does not step: the interface, and the client of one in a thread.

`process_client.py` has the client of a core in a process of its own.
"""

from __future__ import annotations

import itertools
import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from vjax.engine.loop import run_engine
from vjax.engine.protocol import AbortRequests, AddRequests, Call, Command, EngineInfo, Outputs, Reply, Stop, Wake
from vjax.errors import EngineDeadError
from vjax.log import logger
from vjax.messages import EngineRequest
from vjax.scheduler.limits import check_request

if TYPE_CHECKING:
    from vjax.engine.core import EngineCore

log = logger(__name__)


class EngineClient(ABC):
    """Sends to a core, from any thread, and hands on what comes back, in a thread of its own.

    Args:
        on_outputs: A method, called with each step's outputs. Its object is not kept alive.
        on_death: A method, called once if the core ends by itself.

    Attributes:
        info: What the core was built with.
        in_process: Arguments of calls reach the core as they are.
    """

    info: EngineInfo
    in_process = False

    def __init__(self, on_outputs: Callable[[Outputs], None], on_death: Callable[[EngineDeadError], None]):
        self._on_outputs = weakref.WeakMethod(on_outputs)
        self._on_death = weakref.WeakMethod(on_death)
        self._calls: dict[int, Future[Any]] = {}
        self._call_ids = itertools.count()
        #: Guards `_calls` and `_dead`. Reentrant: a collection of garbage, at any moment, may shut an engine down.
        self._lock = threading.RLock()
        #: Set when the core has ended, whatever the reason.
        self._dead: EngineDeadError | None = None

    def add_requests(self, requests: Sequence[EngineRequest]) -> None:
        """Queues requests, all or none.

        Raises:
            VjaxValidationError: One of them could never run.
            EngineDeadError: The core has ended.
        """
        cache, max_model_len = self.info.config.cache, self.info.config.model.max_model_len
        for request in requests:
            check_request(request, max_model_len, cache.num_gpu_blocks, cache.block_size)
        self._check_alive()
        self._post(AddRequests(list(requests)))

    def abort_requests(self, request_ids: Sequence[str]) -> None:
        """Ends requests; their outputs that are on the way still arrive."""
        if request_ids and self._dead is None:
            self._post(AbortRequests(list(request_ids)))

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Calls a method of `EngineCore` between two steps. The future ends with its result, with what it raised, or
        with an EngineDeadError."""
        future: Future[Any] = Future()
        self._send(future, method, arguments)
        return future

    def wait_for(self, method: str, *arguments: Any) -> Future[Any]:
        """As `call`, and done when it returns. For a thread that Ctrl-C may interrupt: it takes the future's own lock
        only while no other thread knows the future, since an interruption may leave it locked."""
        future: Future[Any] = Future()
        done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        future.add_done_callback(done.put)
        self._send(future, method, arguments)
        return done.get()

    def _send(self, future: Future[Any], method: str, arguments: tuple[Any, ...]) -> None:
        """Asks for a call that ends `future`."""
        with self._lock:
            if self._dead is not None:
                future.set_exception(again(self._dead))
                return
            call_id = next(self._call_ids)
            self._calls[call_id] = future
        try:
            self._post(Call(call_id, method, arguments))
        except Exception:  # the arguments cannot be sent
            with self._lock:
                self._calls.pop(call_id, None)
            raise

    @abstractmethod
    def shutdown(self) -> None:
        """Ends the core and frees what it holds; unfinished requests are dropped. May be called more than once."""

    @abstractmethod
    def _post(self, command: Command) -> None:
        """Sends, or does nothing where the core has just ended."""

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise again(self._dead)

    def _take(self, message: Outputs | Reply) -> None:
        """Hands on a message of the core."""
        if isinstance(message, Outputs):
            if handler := self._on_outputs():
                handler(message)
            return
        with self._lock:
            future = self._calls.pop(message.call_id, None)
        if future is None or not future.set_running_or_notify_cancel():
            return
        if message.error is not None:
            future.set_exception(message.error)
        else:
            future.set_result(message.value)

    def _end(self, error: EngineDeadError, *, tell: bool) -> None:
        """The core is gone: every later call, and every one that waits, gets `error`. `tell`: nobody asked for it."""
        with self._lock:
            if self._dead is not None:
                return
            self._dead = error
            calls, self._calls = self._calls, {}
        if tell:
            log.error("%s", error)
        for future in calls.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(again(error))
        if tell and (handler := self._on_death()):
            handler(error)


class ThreadClient(EngineClient):
    """A core in a thread of this process, which owns it from here on."""

    in_process = True

    def __init__(
        self,
        core: EngineCore,
        info: EngineInfo,
        on_outputs: Callable[[Outputs], None],
        on_death: Callable[[EngineDeadError], None],
    ):
        super().__init__(on_outputs, on_death)
        self.info = info
        self._core = core
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="vjax-engine", daemon=True)
        self._thread.start()

    def shutdown(self) -> None:
        self._end(shut_down_error(), tell=False)
        self._post(Stop())
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _post(self, command: Command) -> None:
        self._commands.put(command)

    def _wake(self) -> None:
        self._commands.put(Wake())

    def _receive(self, wait: bool) -> list[Command]:
        commands = [self._commands.get()] if wait else []
        while not self._commands.empty():
            commands.append(self._commands.get())
        return commands

    def _run(self) -> None:
        try:
            log_stats = not self.info.config.disable_log_stats
            run_engine(self._core, self._receive, self._take, self._wake, log_stats=log_stats)
        except BaseException as e:
            self._end(dead_error(f"The engine ended by {type(e).__name__}: {e}", e), tell=True)
        finally:
            self._core.shutdown()


def dead_error(what: str, cause: BaseException | None = None) -> EngineDeadError:
    """An EngineDeadError that says what happened and what to do."""
    error = EngineDeadError(f"{what.rstrip('.')}. Its requests are lost; create a new engine.")
    error.__cause__ = cause
    return error


def shut_down_error() -> EngineDeadError:
    return dead_error("The engine was shut down")


def again(error: EngineDeadError) -> EngineDeadError:
    """The same error for one more waiter: a traceback is one waiter's own."""
    copied = EngineDeadError(*error.args)
    copied.__cause__ = error.__cause__
    return copied
