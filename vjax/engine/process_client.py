"""The client of an engine core in a process of its own (`process.py`).

The child is a plain subprocess, so that a program needs no `if __name__ == "__main__"`. It lives as long as the pipe to
its standard input, which only this process holds open: it ends when this process does, whatever ends that.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import pickle
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import zmq

from vjax import envs
from vjax.config.engine_args import EngineArgs
from vjax.engine.client import EngineClient, dead_error, shut_down_error
from vjax.engine.progress import ProgressReceiver
from vjax.engine.protocol import Command, EngineInfo, Failed, Outputs, Ready, Stop, decode, encode
from vjax.errors import ConfigError, EngineDeadError
from vjax.log import logger
from vjax.messages import EngineRequest
from vjax.models.registry import is_registered, read_hf_config, registered_models
from vjax.text.load import load_tokenizer
from vjax.text.tokenizer import Tokenizer
from vjax.weights.hub import resolve_model_path

log = logger(__name__)

_MODULE = "vjax.engine.process"
#: Seconds that the child gets to end its step and itself.
_PATIENCE = 5.0
#: Milliseconds after the child's death in which its last words, which lie in the socket, are still read.
_LAST_WORDS = 200
_DEATHS = "inproc://deaths"


@dataclass(frozen=True, slots=True)
class Greeting:
    """What the child reads from its standard input."""

    args: EngineArgs
    #: Where the sockets "commands" and "messages" are.
    folder: str
    parent_pid: int
    #: Architectures that the user registered: name -> "module:class".
    models: dict[str, str]


class ChildTraceback(Exception):
    """The traceback of an exception that came from the engine's process, as its cause."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


class ProcessClient(EngineClient):
    """Starts the process; `wait_until_ready` returns once it can serve."""

    def __init__(
        self,
        args: EngineArgs,
        on_outputs: Callable[[Outputs], None],
        on_death: Callable[[EngineDeadError], None],
    ):
        super().__init__(on_outputs, on_death)
        if args.use_v1 is None:
            args = dataclasses.replace(args, use_v1=envs.use_v1())
        #: What becomes of the start, once. No Future: its lock, interrupted, would be the reader's end.
        self._outcome: queue.SimpleQueue[EngineInfo | BaseException] = queue.SimpleQueue()
        self._is_decided = False
        self._is_ready = False
        self._failed: Failed | None = None
        self._progress = ProgressReceiver()
        # A socket's path is short: 107 bytes.
        folder = tempfile.gettempdir()
        self._folder = tempfile.mkdtemp(prefix="vjax-", dir=folder if len(os.fsencode(folder)) < 70 else "/tmp")
        self._context = zmq.Context()
        self._posting = threading.RLock()
        self._is_closed = False
        self._commands = _bind(self._context, zmq.PUSH, f"ipc://{self._folder}/commands")
        messages = _bind(self._context, zmq.PULL, f"ipc://{self._folder}/messages")
        deaths = _bind(self._context, zmq.PAIR, _DEATHS)
        greeting = Greeting(args, self._folder, os.getpid(), registered_models())
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE],
                stdin=subprocess.PIPE,
                env=envs.with_imports(),
                # Ctrl-C is for this process, which then ends the child.
                start_new_session=True,
            )
        except BaseException:
            self._context.destroy(linger=0)
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        # While threads still run, which hold this object.
        atexit.register(self.shutdown)
        self._watcher = threading.Thread(target=self._watch, name="vjax-engine-watcher", daemon=True)
        self._reader = threading.Thread(
            target=self._read, args=(messages, deaths), name="vjax-engine-reader", daemon=True
        )
        self._watcher.start()
        self._reader.start()
        with contextlib.suppress(BrokenPipeError):  # it is dead already, which the watcher tells
            assert self._process.stdin is not None
            self._process.stdin.write(pickle.dumps(greeting))
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Waits for the core to be built; when that fails, nothing of the process is left. To be called once.

        Raises:
            What building it raised in the child: the same type and text.
            EngineDeadError: The child ended without a word.
        """
        try:
            outcome = self._outcome.get()
            if isinstance(outcome, BaseException):
                raise outcome
            self.info = outcome
        except BaseException:
            self.shutdown()
            raise

    def add_requests(self, requests: list[EngineRequest]) -> None:
        self._progress.add(requests)
        try:
            super().add_requests(requests)
        except BaseException:
            self._progress.forget([request.request_id for request in requests])
            raise

    def abort_requests(self, request_ids: list[str]) -> None:
        super().abort_requests(request_ids)
        self._progress.forget(request_ids)

    def shutdown(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        atexit.unregister(self.shutdown)
        self._end(shut_down_error(), tell=False)
        if self._is_ready:
            self._post(Stop())
            self._watcher.join(_PATIENCE)
        if self._watcher.is_alive():
            self._process.kill()
            self._watcher.join()
        if self._reader is not threading.current_thread():
            self._reader.join()
        with self._posting:
            self._commands.close(linger=0)
        if self._reader is not threading.current_thread():
            self._context.term()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _post(self, command: Command) -> None:
        data = encode(command)
        # Without a child there is nobody to send to, which the watcher reports.
        with self._posting, contextlib.suppress(zmq.ZMQError):
            self._commands.send(data, zmq.NOBLOCK)

    # ---- threads ------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Sleeps until the child has ended, and tells the reader."""
        self._process.wait()
        with self._context.socket(zmq.PAIR) as deaths:
            deaths.connect(_DEATHS)
            deaths.send(b"")

    def _read(self, messages: zmq.Socket, deaths: zmq.Socket) -> None:
        """Hands on what the child says, until it has ended."""
        poller = zmq.Poller()
        poller.register(messages, zmq.POLLIN)
        poller.register(deaths, zmq.POLLIN)
        try:
            with messages, deaths:
                while True:
                    ready = dict(poller.poll())
                    if messages in ready:
                        self._hear(messages.recv())
                    elif deaths in ready:
                        break
                while messages.poll(_LAST_WORDS):
                    self._hear(messages.recv())
            self._bury(self._epitaph())
        except BaseException as e:
            self._process.kill()
            self._bury(dead_error(f"The engine's outputs could not be processed: {type(e).__name__}: {e}", e))

    def _hear(self, data: bytes) -> None:
        message = decode(data)
        if isinstance(message, Ready):
            self._is_ready = True
            self._decide(message.info)
            # Both sockets are connected.
            shutil.rmtree(self._folder, ignore_errors=True)
        elif isinstance(message, Failed):
            message.error.__cause__ = ChildTraceback(message.trace)
            self._failed = message
            self._decide(message.error)
        else:
            if isinstance(message, Outputs):
                self._progress.apply(message)
            self._take(message)

    def _bury(self, error: EngineDeadError) -> None:
        self._decide(error)
        # An engine that never was has nobody to tell but `wait_until_ready`.
        self._end(error, tell=self._is_ready)

    def _decide(self, outcome: EngineInfo | BaseException) -> None:
        """The first one counts."""
        if not self._is_decided:
            self._is_decided = True
            self._outcome.put(outcome)

    def _epitaph(self) -> EngineDeadError:
        if self._failed is not None:
            error = self._failed.error
            return dead_error(f"The engine ended by {type(error).__name__}: {error}", error)
        code = self._process.returncode
        how = f"with exit status {code}" if code >= 0 else f"by signal {-code} ({signal.strsignal(-code)})"
        return dead_error(f"The engine's process (pid {self.pid}) ended {how}")


def start_process(
    args: EngineArgs,
    on_outputs: Callable[[Outputs], None],
    on_death: Callable[[EngineDeadError], None],
) -> tuple[ProcessClient, Tokenizer | None]:
    """An engine in a process, ready to serve, and the tokenizer for its front end, which is loaded meanwhile.

    Raises:
        ConfigError, ModelLoadError, OutOfMemoryError: As `build_engine`, from either process.
        EngineDeadError: The process ended without a word.
    """
    # Here, where a download is seen and can be interrupted; the child finds the files.
    model_dir = resolve_model_path(args.model, revision=args.revision, download_dir=args.download_dir)
    _check_architecture(model_dir)
    _check_logits_processors(args)
    client = ProcessClient(args, on_outputs, on_death)
    tokenizer = None
    try:
        if not args.skip_tokenizer_init:
            tokenizer = load_tokenizer(
                args.tokenizer, model_dir=model_dir, revision=args.revision, download_dir=args.download_dir
            )
    except BaseException:
        client.shutdown()
        raise
    client.wait_until_ready()
    return client, tokenizer


def _check_architecture(model_dir: Path) -> None:
    """Raises: ConfigError for a model whose class the child could not import."""
    architectures = read_hf_config(model_dir).get("architectures")
    for architecture in architectures if isinstance(architectures, list) else ():
        if is_registered(architecture) and architecture not in registered_models():
            raise ConfigError(
                f"The class that is registered for {architecture} is defined in the main program, where the engine's "
                'process cannot import it: put it into a module, or register it as "module:class", or keep the engine '
                "in this process (VJAX_ENABLE_V1_MULTIPROCESSING=0).",
                parameter="model",
                value=architecture,
            )


def _check_logits_processors(args: EngineArgs) -> None:
    """Raises: ConfigError for a class that the child could not import."""
    for processor in args.logits_processors or ():
        if isinstance(processor, type) and (processor.__module__ == "__main__" or "<" in processor.__qualname__):
            raise ConfigError(
                f"The logits processor {processor.__qualname__} is defined in the main program or in a function, where "
                "the engine's process cannot import it: put it into a module, or keep the engine in this process "
                "(multiprocess=False, VJAX_ENABLE_V1_MULTIPROCESSING=0).",
                parameter="logits_processors",
                value=processor,
            )


def _bind(context: zmq.Context, kind: int, address: str) -> zmq.Socket:
    socket = context.socket(kind)
    # No limits: a message is never dropped, and sending never blocks.
    socket.set_hwm(0)
    socket.bind(address)
    return socket
