"""Gets an engine's programs lowered while its own process loads weights: from disk, else by worker processes.

Lowering is Python, a second a program, and one process does one at a time. Workers are plain subprocesses without a
GPU; they end with the `with` block, and with this process however it ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from vjax import envs
from vjax.log import logger
from vjax.runner.exported import StepDescription
from vjax.runner.lowered_cache import LoweredCache, source_digest
from vjax.runner.programs import Key

log = logger(__name__)

_MAX_WORKERS = 8
_WORKER = "vjax.runner.lower_worker"


class LoweredPrograms:
    """The exported programs of a step, most of them on their way. A context manager.

    Args:
        description: The step's.
        keys: The programs, in the order in which they will be asked for.
        cache: Where lowered programs are kept; None: nowhere.

    Attributes:
        num_cached: Programs that were on disk.
        num_workers: Processes that lower the others.
        seconds: From the start until the last worker's last program; 0 while there is none.
    """

    def __init__(self, description: StepDescription, keys: Sequence[Key], cache: LoweredCache | None):
        self._started = time.perf_counter()
        self._cache = cache
        self._programs: dict[Key, Future[bytes | None]] = {key: Future() for key in keys}
        self._missing: deque[Key] = deque()
        for key, future in self._programs.items():
            if cache is not None and (data := cache.get(repr(key))) is not None:
                future.set_result(data)
            else:
                self._missing.append(key)
        self.num_cached = len(keys) - len(self._missing)
        self.num_workers = 0
        self.seconds = 0.0
        self._lock = threading.Lock()
        self._closed = self._warned = False
        self._workers: list[_Worker] = []
        self._threads: list[threading.Thread] = []
        try:
            self._start_workers(description)
        except BaseException:
            self.close()
            raise

    def _start_workers(self, description: StepDescription) -> None:
        try:
            for _ in range(min(len(self._missing), max(1, min(_MAX_WORKERS, (os.cpu_count() or 1) // 2)))):
                self._workers.append(_Worker(description))
        except OSError as e:
            self._warn(str(e))
        self.num_workers = self._num_running = len(self._workers)
        if not self._workers:
            self._give_up()
        for worker in self._workers:
            thread = threading.Thread(target=self._feed, args=(worker,), name="vjax-lower", daemon=True)
            thread.start()
            self._threads.append(thread)

    def __enter__(self) -> LoweredPrograms:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def get(self, key: Key) -> bytes | None:
        """What `export_program` made of the program; waits for it. None: it has to be lowered in this process."""
        future = self._programs.get(key)
        return None if future is None else future.result()

    def summary(self) -> str:
        """How the programs were lowered, for a log."""
        if not self.num_workers:
            return f"{self.num_cached} lowered ones on disk"
        number = len(self._programs) - self.num_cached
        return (
            f"{number} lowered by {self.num_workers} processes within {self.seconds:.1f} s, {self.num_cached} on disk"
        )

    def close(self) -> None:
        """Ends the workers. Programs that they still owed are None."""
        self._closed = True
        for worker in self._workers:
            worker.end()
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.release()
        self._give_up()

    def _feed(self, worker: _Worker) -> None:
        """Has a worker lower programs until none is missing or it fails."""
        while (key := self._next()) is not None:
            answer = None
            try:
                answer = worker.lower(key)
            except Exception as e:  # whatever a stream that breaks off looks like to pickle
                self._warn(f"{type(e).__name__}: {e}; {worker.last_words()}")
                break
            else:
                if isinstance(answer, str):
                    self._warn(answer)
                    answer = None
                elif self._cache is not None:
                    self._cache.put(repr(key), answer)
            finally:
                self.seconds = max(self.seconds, time.perf_counter() - self._started)
                self._programs[key].set_result(answer)
        worker.end()
        with self._lock:
            self._num_running -= 1
            is_last = self._num_running == 0
        if is_last:
            self._give_up()

    def _next(self) -> Key | None:
        try:
            return self._missing.popleft()
        except IndexError:
            return None

    def _give_up(self) -> None:
        """Nobody is left to lower what is missing."""
        while (key := self._next()) is not None:
            self._programs[key].set_result(None)

    def _warn(self, reason: str) -> None:
        with self._lock:
            if self._closed or self._warned:
                return
            self._warned = True
        log.warning("programs are lowered in this process, which takes longer: a worker process failed (%s)", reason)


class _Worker:
    """One process of `lower_worker.py`. It imports JAX while its input waits in the pipe."""

    def __init__(self, description: StepDescription):
        self._errors = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=envs.without_device(),
                # Ctrl-C is for the engine's process, which then ends its workers.
                start_new_session=True,
            )
        except BaseException:
            self._errors.close()
            raise
        self._greeting: Any = (source_digest(), description)

    def lower(self, key: Key) -> bytes | str:
        """The exported program, or why there is none.

        Raises:
            OSError, EOFError, pickle.UnpicklingError: The process ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        if self._greeting is not None:
            pickle.dump(self._greeting, stdin)
            self._greeting = None
        pickle.dump(key, stdin)
        stdin.flush()
        return pickle.load(stdout)

    def last_words(self) -> str:
        """How the process ended, and the end of what it wrote to stderr."""
        try:
            ended = f"exit status {self._process.wait(timeout=5)}"
        except subprocess.TimeoutExpired:
            ended = "still running"
        self._errors.seek(0)
        return f"{ended}: {self._errors.read().decode(errors='replace').strip()[-500:]}"

    def end(self) -> None:
        """Ends the process, at once."""
        self._process.kill()
        self._process.wait()

    def release(self) -> None:
        """Closes the pipes, once nobody uses them."""
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # what was not yet sent
                stream.close()
