"""What the benchmark, the tuner and the check work on: an op's cases with their functions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Timed:
    """One case of the benchmark.

    `columns` maps a name (an implementation, or a baseline such as "cudnn") to a function of the arguments. In a
    chained case it is step(state, *arguments) -> (state, result), which may update the state in place.
    """

    name: str
    columns: Mapping[str, Callable]
    arguments: Callable[[int], tuple]
    """Arguments for a seed."""
    read_bytes: float
    """Bytes of the arguments that a call reads, for rotation beyond the L2."""
    bytes_moved: float | None = None
    flops: float | None = None
    ceiling: str = "copy"
    """The ceiling that bounds it: read, copy or matmul."""
    state: Callable[[], Any] | None = None
    """First state of a chained case."""
    kernels: Sequence[str] = ("",)
    """Parts of the names of the kernels that count where the device times each; all of them by default."""
    compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """For XLA."""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A kernel's tunable case: facts and sizes as in tuning.lookup."""

    kernel: str
    exact: dict[str, int | str | bool]
    sizes: dict[str, int]
    candidates: Sequence[Any]
    """Configs, the heuristic's first."""
    timed: Callable[[Any], Sequence[Timed]]
    """Of a config: cases with one column, "config", that runs the kernel with it. The mean of their times decides."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """One correctness case: `error(implementation)` is the largest relative error, at most `allowed`."""

    name: str
    error: Callable[[str], float]
    allowed: float


@dataclasses.dataclass(frozen=True)
class Op:
    """An op of the package, as the command line knows it."""

    name: str
    timed: Callable[[], Sequence[Timed]]
    tuned: Callable[[], Sequence[Tuned]]
    checked: Callable[[], Sequence[Checked]]


def normal(shape: Sequence[int], dtype: Any = jnp.bfloat16, seed: int = 0) -> jax.Array:
    """Normally distributed values on the default device."""
    return _normal(jax.random.key(seed), tuple(shape), jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def relative_error(got: Any, wanted: Any) -> float:
    """Largest over the rows (all but the last axis) of the largest error over the largest value of the row."""
    got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
    if not np.isfinite(got).all():
        return float("inf")
    scale = np.maximum(np.max(np.abs(wanted), axis=-1), 1e-6)
    return float(np.max(np.max(np.abs(got - wanted), axis=-1) / scale, initial=0.0))
