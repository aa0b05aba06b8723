"""`python -m vjax.engine.process`: an engine core for a client in another process.

Reads a `Greeting` from stdin, builds the core, says `Ready` or `Failed`, and serves. One thread does all of it: waiting
for commands, steps, and packing outputs; another one sleeps until stdin closes or the client's process ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import shutil
import signal
import sys
import threading
import traceback

import zmq

from vjax.engine.loop import run_engine
from vjax.engine.process_client import Greeting
from vjax.engine.progress import ProgressSender
from vjax.engine.protocol import (
    AbortRequests,
    AddRequests,
    Command,
    Failed,
    Message,
    Outputs,
    Ready,
    Reply,
    Wake,
    decode,
    encode,
)

#: Milliseconds in which the last message has to be on its way.
_LINGER = 2000
_WAKE_UPS = "inproc://wake-ups"


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        greeting: Greeting = pickle.load(sys.stdin.buffer)
    except EOFError:
        return 1
    threading.Thread(target=_end_with_client, args=(greeting,), daemon=True).start()
    with zmq.Context() as context:
        link = _Link(context, greeting.folder)
        try:
            _serve(greeting, link)
        except BaseException as e:
            link.send(Failed(e, traceback.format_exc()))
            return 1
        finally:
            link.close()
    return 0


class _Link:
    """The two sockets to the client. The one for commands hears this process too, which can wake itself up."""

    def __init__(self, context: zmq.Context, folder: str):
        self._commands = _connect(context, zmq.PULL, f"ipc://{folder}/commands")
        self._commands.bind(_WAKE_UPS)
        self._messages = _connect(context, zmq.PUSH, f"ipc://{folder}/messages")
        self._wake_ups = _connect(context, zmq.PUSH, _WAKE_UPS)
        self._waking = threading.Lock()
        self._progress = ProgressSender()

    def receive(self, wait: bool) -> list[Command]:
        """Commands that have arrived; at least one with `wait`."""
        commands: list[Command] = [self._next(0)] if wait else []
        while self._commands.get(zmq.EVENTS) & zmq.POLLIN:  # pyright: ignore[reportOperatorIssue]
            commands.append(self._next(zmq.NOBLOCK))
        return commands

    def _next(self, flags: int) -> Command:
        command = decode(self._commands.recv(flags))
        if isinstance(command, AddRequests):
            self._progress.add(command.requests)
        elif isinstance(command, AbortRequests):
            self._progress.forget(command.request_ids)
        return command

    def step_done(self, message: Outputs | Reply) -> None:
        if isinstance(message, Outputs):
            self._progress.attach(message)
        self.send(message)

    def send(self, message: Message) -> None:
        self._messages.send(encode(message))

    def wake(self) -> None:
        """Has `receive` return; from any thread."""
        # A socket that was closed has nobody to wake up.
        with self._waking, contextlib.suppress(zmq.ZMQError):
            self._wake_ups.send(encode(Wake()), zmq.NOBLOCK)

    def close(self) -> None:
        with self._waking:
            self._wake_ups.close(linger=0)
        self._commands.close(linger=0)
        self._messages.close(linger=_LINGER)


def _serve(greeting: Greeting, link: _Link) -> None:
    from vjax.engine import heap
    from vjax.engine.builder import build_engine
    from vjax.models.registry import ModelRegistry

    for architecture, where in greeting.models.items():
        ModelRegistry.register_model(architecture, where)
    built = build_engine(greeting.args, with_tokenizer=False)
    core = built.core
    try:
        heap.freeze(core)
        link.send(Ready(built.info))
        log_stats = not greeting.args.disable_log_stats
        run_engine(core, link.receive, link.step_done, link.wake, log_stats=log_stats)
    finally:
        core.shutdown()


def _end_with_client(greeting: Greeting) -> None:
    """Ends this process as soon as the client's has ended or closed the pipe."""
    ends = [sys.stdin.fileno()]
    try:
        # A process that the client forked may hold the pipe open.
        ends.append(os.pidfd_open(greeting.parent_pid))
    except (AttributeError, OSError):
        pass
    select.select(ends, [], [])
    shutil.rmtree(greeting.folder, ignore_errors=True)
    os._exit(1)


def _connect(context: zmq.Context, kind: int, address: str) -> zmq.Socket:
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.connect(address)
    return socket


if __name__ == "__main__":
    sys.exit(main())
