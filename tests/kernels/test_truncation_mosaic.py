"""The truncation kernel against the definition: several warpgroups and rows a CTA, few slots, hard rows."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench.truncation import CANDIDATES, LOGITS
from pallas_kernels.sampling_truncation import reference
from pallas_kernels.sampling_truncation.shapes import VOCABS
from tests.kernels.cases import assert_no_races, needs_mosaic, on_gpu
from tests.kernels.test_truncation import OPTIONS

pytestmark = needs_mosaic


def run(logits: np.ndarray, options: list, config: tuple, interpret: bool) -> np.ndarray:
    from pallas_kernels.sampling_truncation.mosaic_gpu import Config, truncate_logits

    k, p, m = (np.array(column) for column in zip(*options, strict=True))
    columns = [jnp.asarray(k, jnp.int32), jnp.asarray(p, jnp.float32), jnp.asarray(m, jnp.float32)]
    # An interpreted call holds Python callbacks: nothing to compile once and keep.
    truncate = truncate_logits if interpret else jax.jit(truncate_logits, static_argnames=("interpret", "config"))
    return np.asarray(truncate(jnp.asarray(logits), *columns, interpret=interpret, config=Config(*config)))


def check(logits: np.ndarray, options: list, config: tuple, interpret: bool) -> None:
    got = run(logits, options, config, interpret)
    if interpret:
        assert_no_races()
    assert_kept(got, wanted_of(logits, options), logits, options)


def wanted_of(logits: np.ndarray, options: list) -> np.ndarray:
    return reference.truncate_logits(logits, *(np.array(column) for column in zip(*options, strict=True)))


def assert_kept(got: np.ndarray, wanted: np.ndarray, logits: np.ndarray, options: list) -> None:
    """The same values are kept, but for some at the edge of top-p, whose mass the two sum in another order."""
    mass = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    mass /= mass.sum(-1, keepdims=True)
    kept = np.isfinite(got)
    np.testing.assert_array_equal(got[kept], logits[kept])
    for row, (top_k, top_p, min_p) in enumerate(options):
        differing = kept[row] != np.isfinite(wanted[row])
        allowed = 0.0 if top_p >= 1 and min_p <= 0 else 5e-5
        assert mass[row, differing].sum() <= allowed, f"top_k={top_k} top_p={top_p} min_p={min_p}"


# The interpreter runs a warpgroup in a thread of XLA's pool, which has one for each core: two that wait for each other
# are the most that a machine of two cores can run.
@pytest.mark.parametrize("config", [(2, 1, 2, 8, 8), (1, 2, 1, 8, 12)])
def test_rows_of_a_cta_warpgroups_and_a_tail(config: tuple):
    logits = np.random.default_rng(1).normal(0, 3, (3, 2200)).astype(np.float32)
    check(logits, [(50, 1.0, 0.0), (0, 0.9, 0.0), (40, 0.95, 0.001)], config, interpret=True)


def test_hard_rows():
    """Eight slots a thread: most of these rows have more values in their brackets than a scan can hold."""
    rng = np.random.default_rng(3)
    rows = rng.normal(0, 3, (8, 1100)).astype(np.float32)
    rows[0] = 0.25
    rows[1, 100:] = -np.inf
    rows[2, 17] = 500.0  # far from anything that a sample sees
    rows[3] = np.sort(rows[3])
    rows[4] = -1e30 * np.arange(1, 1101)
    rows[5] = rng.integers(1, 4, 1100)
    rows[6] = 1 + rng.normal(0, 1e-6, 1100)
    rows[7, :800] = -1e30
    options = [(5, 0.5, 0.0), (200, 0.9, 0.0), (0, 0.9, 0.0), (33, 1.0, 0.0), (3, 1.0, 0.0)]
    options += [(0, 0.9, 0.0), (0, 0.7, 0.0), (250, 0.8, 1e-4)]
    check(rows, options, (1, 1, 2, 8, 8), interpret=True)


def test_rows_without_a_finite_maximum_end():
    logits = np.random.default_rng(4).normal(0, 3, (3, 512)).astype(np.float32)
    logits[:, 7] = np.nan, np.inf, -np.inf
    logits[2] = -np.inf
    assert run(logits, [(5, 0.5, 0.1)] * 3, (1, 1, 2, 8, 8), interpret=True).shape == (3, 512)


@functools.lru_cache(maxsize=1)
def real_case(vocab: int, kind: str) -> tuple[np.ndarray, list, np.ndarray]:
    """Logits, options and what the definition keeps of them, which takes longer than all configs of the kernel."""
    base = np.random.default_rng(vocab).normal(0, 1, (29, vocab)).astype(np.float32)
    logits = np.asarray(LOGITS[kind](jnp.asarray(base)))
    options = [*OPTIONS, *OPTIONS, (vocab // 4, 0.9, 0.0)]
    return logits, options, wanted_of(logits, options)


@pytest.mark.parametrize("config", [pytest.param(config, marks=on_gpu) for config in CANDIDATES])
@pytest.mark.parametrize("vocab", [1000, *VOCABS.values()])
@pytest.mark.parametrize("kind", list(LOGITS))
def test_real_sizes(config: tuple, vocab: int, kind: str):
    logits, options, wanted = real_case(vocab, kind)
    got = run(logits, options, config, interpret=False)
    assert_kept(got, wanted, logits, options)
    np.testing.assert_array_equal(run(logits, options, config, interpret=False), got)
