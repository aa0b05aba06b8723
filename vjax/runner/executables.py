"""Compiles the step's programs ahead of time and hands out the tightest one for a step.

Executables are compiled objects, not jitted functions: a call with another shape is an error, never a silent retrace.
On a GPU all are compiled before serving starts. On the CPU, where compilation takes the cores that serve, each is
compiled when it is first needed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from pallas_kernels import product_options
from vjax.log import logger, warning_once
from vjax.runner.buckets import Buckets, ForwardBucket
from vjax.runner.exported import import_program
from vjax.runner.kernels import KernelCompiler, kernels_of
from vjax.runner.programs import (
    Key,
    OpeningBucket,
    PoolBucket,
    SampleBucket,
    ScoreBucket,
    all_keys,
    feature_bucket,
    lower,
    make_program,
    sample_buckets,
)
from vjax.runner.step import POOLED_VECTORS, SCORED_TOKENS, Step
from vjax.sample.sampler import NO_FEATURES, Feature, Variant

log = logger(__name__)

# XLA recomputes cheap ops once arguments and temporaries pass about 80% of the device's memory, which a full KV cache
# always does; with that the largest prefill bucket grew from 434 to 595 kernels.
_GPU_OPTIONS = {"xla_disable_hlo_passes": "rematerialization"}

_DEFAULT_THREADS = max(1, min(8, (os.cpu_count() or 1) // 2))

#: Wraps an iterable of a known length, as tqdm does.
#: What is worked through, how many they are, and a word for what is done with them.
Progress = Callable[[Iterable, int, str], Iterable]
#: The exported form of a program (see `exported.py`), or None.
Exported = Callable[[Key], bytes | None]


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
        #: What `compile_all` lowered and has not compiled yet.
        self._lowered: dict[Key, Any] = {}
        # Tracing is Python: threads that trace at the same time only make each other slow.
        self._tracing = threading.Lock()

    # ---- choosing -----------------------------------------------------------------------------------------------

    def forward_for(self, num_tokens: int, num_seqs: int, *, keeps_hidden: bool = False) -> tuple[ForwardBucket, Any]:
        """The tightest bucket for a step, and its executable or the one that keeps hidden states."""
        bucket = self.buckets.forward_bucket(num_tokens, num_seqs)
        if keeps_hidden:
            bucket = replace(bucket, keeps_hidden=True, opening=0)
        return bucket, self._serve(bucket)

    def opening_of(self, bucket: ForwardBucket) -> Any:
        """The executable of the layers that a bucket with an opening begins with."""
        return self._serve(OpeningBucket(bucket))

    def score_for(self, num_tokens: int, *, with_all: bool) -> Any:
        """The executable that scores prompt tokens of a forward of `num_tokens`."""
        return self._serve(ScoreBucket(num_tokens, with_all))

    def sample_for(self, num_rows: int, variant: Variant, features: Feature = NO_FEATURES) -> tuple[SampleBucket, Any]:
        """The tightest bucket for `num_rows` rows, at least as capable as `variant`, and with these features, and its
        executable."""
        if features:
            bucket = feature_bucket(self.buckets.sample, num_rows, features)
        else:
            bucket = next(b for b in self._sample_buckets if b.variant >= variant and b.num_rows >= num_rows)
        return bucket, self._serve(bucket)

    def pool_for(self, num_tokens: int, *, sums: bool) -> Any:
        """The executable that pools tokens of a forward of `num_tokens`: vectors of single ones, or sums."""
        return self._serve(PoolBucket(num_tokens, sums))

    def update(self, name: str) -> Any:
        """ "write_rows", "write_masked_ids" or "write_processors"."""
        return self._serve(name)

    def ready(self) -> list[tuple[Key, Any]]:
        """What is compiled."""
        return list(self._ready.items())

    def _serve(self, key: Key) -> Any:
        if (compiled := self._ready.get(key)) is not None:
            return compiled
        self.num_compilations_while_serving += 1
        return self.compile(key)

    # ---- compiling ----------------------------------------------------------------------------------------------

    def all_keys(self) -> list[Key]:
        """Every program, those that take longest to compile first."""
        return all_keys(self.buckets)

    def compile_all(
        self,
        keys: Sequence[Key] | None = None,
        progress: Progress = lambda it, total, doing: it,
        *,
        exported: Exported | None = None,
        kernels_first: bool = False,
        num_threads: int = _DEFAULT_THREADS,
    ) -> None:
        """Compiles `keys` (default: everything) now, in `num_threads` threads.

        Args:
            exported: Where lowered programs come from; what it has not is lowered here, one after the other.
            kernels_first: Whether to compile the Mosaic GPU kernels of all programs before any program (see
                `kernels.py`). Wasted where XLA's cache has the programs; else it pays as soon as lowering is quick.
        """
        missing = [k for k in (keys or self.all_keys()) if k not in self._ready]
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="vjax-compile")
        try:
            if kernels_first:
                self._compile_kernels(missing, exported, progress)
            futures = [pool.submit(self.compile, k, exported) for k in missing]
            for done in progress(as_completed(futures), len(missing), "Compiling"):
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)
            self._lowered.clear()

    def _compile_kernels(self, keys: Sequence[Key], exported: Exported | None, progress: Progress) -> None:
        """Lowers programs, for `compile` to find, and meanwhile compiles the kernels of those lowered."""
        started = time.perf_counter()
        with KernelCompiler(self.mesh, self._tracing) as compiler:
            for key in progress(keys, len(keys), "Compiling kernels"):
                data = None if exported is None else exported(key)
                with self._tracing:
                    self._lowered[key] = self.lower(key, data)
                    kernels = kernels_of(self._lowered[key])
                compiler.add(kernels)
            num_kernels = compiler.wait()
        log.debug("compiled %d kernels in %.2f s", num_kernels, time.perf_counter() - started)

    def compile(self, key: Key, exported: Exported | None = None) -> Any:
        """The executable of `key`, compiled now if it is not ready."""
        if (compiled := self._ready.get(key)) is not None:
            return compiled
        if (lowered := self._lowered.pop(key, None)) is None:
            data = None if exported is None else exported(key)
            with self._tracing:
                lowered = self.lower(key, data)
        started = time.perf_counter()
        compiled = lowered.compile(compiler_options=_gpu_options(key) if self.platform == "gpu" else None)
        log.debug("compiled %s in %.2f s", getattr(key, "name", key), time.perf_counter() - started)
        self._ready[key] = compiled
        return compiled

    def lower(self, key: Key, data: bytes | None = None) -> Any:
        """The lowered (not yet compiled) program of `key`, from its exported form if that is given."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            program = make_program(self.step, key, self.mesh)
        if data is not None:
            try:
                return lower(import_program(program, data, self.step.geometry.implementation), self.mesh)
            except Exception as e:
                warning_once(log, f"a program that was lowered elsewhere cannot be used here: {type(e).__name__}: {e}")
        return lower(program, self.mesh)

    def shutdown(self) -> None:
        self._ready.clear()


def _gpu_options(key: Key) -> dict[str, str | bool | int]:
    rows = 0
    if isinstance(key, ForwardBucket):
        rows = key.num_tokens
    elif isinstance(key, OpeningBucket):
        rows = key.forward.num_tokens
    elif isinstance(key, SampleBucket):
        rows = key.num_rows
    elif isinstance(key, ScoreBucket):
        rows = SCORED_TOKENS
    elif isinstance(key, PoolBucket):
        rows = POOLED_VECTORS
    return _GPU_OPTIONS | product_options(rows)
