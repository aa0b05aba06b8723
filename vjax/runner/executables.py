"""Compiles the step's executables ahead of time and hands out the tightest one that is ready.

Executables are compiled objects, not jitted functions: a call with another shape is an error, never a silent retrace.
On a GPU a covering set is compiled before serving starts and the rest in the background; a step then runs the tightest
bucket that is ready. On the CPU, where compilation takes the cores that serve, each bucket is compiled when it is first
needed. `compile_all` does everything at once, with progress.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vjax.log import logger
from vjax.parallel.sharding import named_sharding
from vjax.runner.buckets import Buckets, ForwardBucket
from vjax.runner.packing import UpdateLayout
from vjax.runner.rows import MAX_MASKED_IDS
from vjax.runner.step import Step
from vjax.sample.sampler import Variant

log = logger(__name__)

# XLA recomputes cheap ops once arguments and temporaries pass about 80% of the device's memory, which a full KV cache
# always does; with that the largest prefill bucket grew from 434 to 595 kernels.
_GPU_OPTIONS = {"xla_disable_hlo_passes": "rematerialization"}
_MAX_COMPILE_THREADS = 8
#: Fewer behind a serving engine: each autotunes in what memory the KV cache left.
_MAX_BACKGROUND_THREADS = 2
#: Seconds after which a thread that traces hands the interpreter to the serving thread, while programs are compiled
#: behind it (Python's default is 0.005, more than a decode step).
_SWITCH_INTERVAL = 0.0005


@dataclass(frozen=True)
class SampleBucket:
    num_rows: int
    variant: Variant

    @property
    def name(self) -> str:
        return f"sample_{self.variant.name.lower()}[{self.num_rows}]"


def sample_buckets(sizes: Sequence[int]) -> list[SampleBucket]:
    """Every sample program, by variant and then by size. Those that truncate take long to lower: every other size."""
    sparse = sizes[::-2][::-1]
    return [SampleBucket(n, v) for v in Variant for n in (sizes if v < Variant.TRUNCATED else sparse)]


Key = ForwardBucket | SampleBucket | str
#: Wraps an iterable of a known length, as tqdm does.
Progress = Callable[[Iterable, int], Iterable]


class Executables:
    """All compiled programs of one engine.

    Args:
        step: The functions and their shapes.
        buckets: The shapes to compile.
        mesh: Where the arrays live.
        platform: "cpu" or "gpu".
    """

    def __init__(self, step: Step, buckets: Buckets, mesh: Mesh, platform: str):
        self.step = step
        self.buckets = buckets
        self.mesh = mesh
        self.platform = platform
        #: Compilations done while a step was waiting for them (counted; zero once everything is compiled).
        self.num_compilations_while_serving = 0
        self._sample_buckets = sample_buckets(buckets.sample)
        self._ready: dict[Key, Any] = {}
        self._lock = threading.Lock()
        self._key_locks: dict[Key, threading.Lock] = {}
        # Tracing is Python: threads that trace at the same time only make each other slow.
        self._tracing = threading.Lock()
        self._num_threads = max(1, min(_MAX_COMPILE_THREADS, (os.cpu_count() or 1) // 2))
        self._background: threading.Thread | None = None
        self._stopped = False

    # ---- choosing -----------------------------------------------------------------------------------------------

    def forward_for(self, num_tokens: int, num_seqs: int) -> tuple[ForwardBucket, Any]:
        """The tightest ready bucket for a step, and its executable."""
        return self._choose(self.buckets.forward_candidates(num_tokens, num_seqs))

    def sample_for(self, num_rows: int, variant: Variant) -> Any:
        """The executable that samples `num_rows` rows, at least as capable as `variant`."""
        capable = [b for b in self._sample_buckets if b.variant >= variant and b.num_rows >= num_rows]
        return self._choose(capable)[1]

    def update(self, name: str) -> Any:
        """ "write_rows" or "write_masked_ids"."""
        return self._choose((name,))[1]

    def get_ready(self, key: Key) -> Any | None:
        return self._ready.get(key)

    def _choose(self, candidates: Sequence[Any]) -> tuple[Any, Any]:
        for key in candidates if self.platform == "gpu" else candidates[:1]:
            if (compiled := self._ready.get(key)) is not None:
                return key, compiled
        self.num_compilations_while_serving += 1
        return candidates[0], self.compile(candidates[0])

    # ---- compiling ----------------------------------------------------------------------------------------------

    def all_keys(self) -> list[Key]:
        return ["write_rows", "write_masked_ids", *self.buckets.decode, *self.buckets.mixed, *self._sample_buckets]

    def covering_keys(self) -> list[Key]:
        """What is compiled before serving: everything but every other size of forward, so that no step runs in a bucket
        far too large for it. The head's products are the ones whose autotuning needs much memory: they must not be left
        to the background, where the KV cache has taken it."""
        b = self.buckets
        forward = [*b.decode[-1::-2], b.decode[0], *b.mixed[-1::-2]]
        return list(dict.fromkeys(["write_rows", "write_masked_ids", *forward, *self._sample_buckets]))

    def compile_all(self, keys: list[Key] | None = None, progress: Progress = lambda it, total: it) -> None:
        """Compiles `keys` (default: everything) now, in several threads."""
        missing = [k for k in (keys or self.all_keys()) if k not in self._ready]
        with ThreadPoolExecutor(self._num_threads, thread_name_prefix="vjax-compile") as pool:
            for done in progress(as_completed([pool.submit(self.compile, k) for k in missing]), len(missing)):
                done.result()

    def compile_in_background(self) -> None:
        """Compiles what is missing in threads that end, after the program they are at, with `shutdown` or with the
        process."""
        missing = deque(k for k in self.all_keys() if k not in self._ready)
        interval = sys.getswitchinterval()

        def compile_missing() -> None:
            while missing and not self._stopped and threading.main_thread().is_alive():
                try:
                    key = missing.popleft()
                except IndexError:
                    return
                try:
                    self.compile(key)
                except Exception as e:  # the tighter bucket stays unavailable; a wider one serves
                    log.warning("could not compile %s in the background: %s", getattr(key, "name", key), e)

        def supervise() -> None:
            sys.setswitchinterval(_SWITCH_INTERVAL)
            count = min(self._num_threads, _MAX_BACKGROUND_THREADS)
            workers = [threading.Thread(target=compile_missing, name="vjax-compile") for _ in range(count)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            sys.setswitchinterval(interval)

        self._background = threading.Thread(target=supervise, name="vjax-compile")
        self._background.start()

    def wait(self) -> None:
        """Blocks until background compilation is done."""
        if self._background is not None:
            self._background.join()

    def shutdown(self) -> None:
        self._stopped = True
        self.wait()
        self._ready.clear()

    def compile(self, key: Key) -> Any:
        """The executable of `key`, compiled now if it is not ready."""
        with self._lock:
            lock = self._key_locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._ready:
                options = _GPU_OPTIONS if self.platform == "gpu" else None
                with self._tracing:
                    lowered = self.lower(key)
                self._ready[key] = lowered.compile(compiler_options=options)
            return self._ready[key]

    def lower(self, key: Key) -> Any:
        """The lowered (not yet compiled) program of `key`."""
        step, model = self.step, self.step.model
        kv = jax.tree.map(lambda s: self._spec(s, (None, "kv_heads", None, None)), step.kv_specs())
        rows = jax.tree.map(lambda s: self._spec(s, (None,) * len(s.shape)), step.row_specs())
        head = tuple(self._leaf(name) for name in model.head_leaf_names)
        if isinstance(key, ForwardBucket):
            leaves = tuple(self._leaf(name) for name in model.leaf_names)

            def forward(leaves, kv, rows, packed):
                return step.forward(key, leaves, kv, rows, packed)

            return self._lower(forward, (1, 2), leaves, kv, rows, self._buffer(step.layout(key).size))
        if isinstance(key, SampleBucket):

            def sample(head, rows):
                return step.sample(key.num_rows, key.variant, head, rows)

            return self._lower(sample, (1,), head, rows)
        if key == "write_rows":
            return self._lower(step.write_rows, (0,), rows, self._buffer(UpdateLayout().size))
        assert key == "write_masked_ids", key
        return self._lower(step.write_masked_ids, (0,), rows, self._buffer(1 + MAX_MASKED_IDS))

    def _lower(self, fn: Callable, donate: tuple[int, ...], *args) -> Any:
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return jax.jit(fn, donate_argnums=donate).lower(*args)

    def _spec(self, s: jax.ShapeDtypeStruct, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=named_sharding(self.mesh, axes))

    def _leaf(self, name: str) -> jax.ShapeDtypeStruct:
        return self._spec(self.step.model.leaf_specs[name], self.step.model.logical_axes[name])

    def _buffer(self, size: int) -> jax.ShapeDtypeStruct:
        return self._spec(jax.ShapeDtypeStruct((size,), jnp.int32), (None,))
