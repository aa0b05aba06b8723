"""Cases of truncate_logits."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.cases import Checked, Op, Timed, Tuned, normal
from pallas_kernels.sampling_truncation import reference
from pallas_kernels.sampling_truncation.api import truncate_logits
from pallas_kernels.sampling_truncation.shapes import VOCABS

# name -> (top_k, top_p, min_p)
_OPTIONS = {
    "off": (0, 1.0, 0.0),
    "top-k 50": (50, 1.0, 0.0),
    "top-k 20000": (20000, 1.0, 0.0),
    "top-p 0.9": (0, 0.9, 0.0),
    "min-p 0.05": (0, 1.0, 0.05),
    "all three": (50, 0.9, 0.02),
}
LOGITS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "normal": lambda x: x * 3,
    "flat": lambda x: x * 0.01,
    "peaked": lambda x: x * 12,
    "bfloat16": lambda x: (x * 2).astype(jnp.bfloat16).astype(jnp.float32),
    "constant": lambda x: x * 0,
    "masked": lambda x: jnp.where(x > 1, x, -jnp.inf),
}
# Fields of mosaic_gpu.Config, in order; the ones that compile without spills.
CANDIDATES = (
    (2, 2, 6, 32, 88),
    (2, 2, 5, 32, 88),
    (2, 2, 4, 32, 88),
    (2, 2, 3, 32, 88),
    (1, 4, 6, 16, 44),
    (1, 4, 4, 16, 44),
)


def _columns(rows: int, options: tuple) -> tuple[jax.Array, ...]:
    k, p, m = options
    return jnp.full(rows, k, jnp.int32), jnp.full(rows, p, jnp.float32), jnp.full(rows, m, jnp.float32)


def _timed_case(rows: int, vocab: int, name: str, columns: dict[str, Callable]) -> Timed:
    def arguments(seed: int) -> tuple:
        return normal((rows, vocab), jnp.float32, seed) * 3, *_columns(rows, _OPTIONS[name])

    # Counted as one reading: the figure to compare is a multiple of it.
    return Timed(f"[{rows}, {vocab}] {name}", columns, arguments, 4 * rows * vocab, 4 * rows * vocab, ceiling="read")


def _timed() -> list[Timed]:
    columns = {name: functools.partial(truncate_logits, implementation=name) for name in ("mosaic_gpu", "xla")}
    shapes = ((1, 128256), (64, 128256), (256, 128256), (256, 151936))
    return [_timed_case(*shape, name, columns) for shape, name in itertools.product(shapes, _OPTIONS)]


def _tuned() -> list[Tuned]:
    from pallas_kernels.sampling_truncation import mosaic_gpu as kernel

    def timed(rows: int, vocab: int, config: Any) -> list[Timed]:
        run = functools.partial(kernel.truncate_logits, config=config, interpret=False)
        return [_timed_case(rows, vocab, "top-p 0.9", {"config": run})]

    candidates = [kernel.Config(*values) for values in CANDIDATES]
    return [
        Tuned(
            "truncate_logits",
            {},
            {"rows": rows, "vocab": vocab},
            [kernel.default_config(rows, vocab), *candidates],
            functools.partial(timed, rows, vocab),
        )
        for rows, vocab in ((1, 128256), (64, 128256), (256, 128256), (256, 151936), (256, 32000))
    ]


def _error(kind: str, rows: int, vocab: int, implementation: str) -> float:
    """Probability of the values on which the kept sets differ; infinite when a kept value changed."""
    options = [list(_OPTIONS.values())[row % len(_OPTIONS)] for row in range(rows)]
    logits = np.asarray(LOGITS[kind](normal((rows, vocab), jnp.float32, 7)))
    columns = [np.array(column) for column in zip(*options, strict=True)]
    typed = [jnp.asarray(x, t) for x, t in zip(columns, (jnp.int32, jnp.float32, jnp.float32), strict=True)]
    got = np.asarray(truncate_logits(jnp.asarray(logits), *typed, implementation=implementation))
    wanted = reference.truncate_logits(logits, *columns)
    kept = np.isfinite(got)
    if not np.array_equal(got[kept], logits[kept]) or not kept.any(-1).all():
        return float("inf")
    mass = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    mass /= mass.sum(-1, keepdims=True)
    return float(np.max(np.sum(np.where(kept != np.isfinite(wanted), mass, 0.0), axis=-1)))


def _checked() -> list[Checked]:
    vocabs = [*VOCABS.values(), 1000]
    return [
        # float32 sums move a threshold by rounding.
        Checked(f"{kind}, 12 x {vocab}", functools.partial(_error, kind, 12, vocab), 5e-5)
        for kind, vocab in itertools.product(LOGITS, vocabs)
    ]


TRUNCATE_LOGITS = Op("truncate_logits", _timed, _tuned, _checked)
