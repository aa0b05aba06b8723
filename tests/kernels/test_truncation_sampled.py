"""The sampled truncation kernel against the definition: several warpgroups, few slots, hard rows."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench.truncation import CANDIDATES
from pallas_kernels.sampling_truncation import reference
from pallas_kernels.sampling_truncation.shapes import VOCABS
from tests.kernels.cases import assert_no_races, needs_mosaic, on_gpu
from tests.kernels.test_truncation import OPTIONS

pytestmark = needs_mosaic


def run(logits: np.ndarray, options: list, config: tuple, interpret: bool) -> np.ndarray:
    from pallas_kernels.sampling_truncation.mosaic_sampled import Config, truncate_logits

    k, p, m = (np.array(column) for column in zip(*options, strict=True))
    columns = [jnp.asarray(k, jnp.int32), jnp.asarray(p, jnp.float32), jnp.asarray(m, jnp.float32)]
    return np.asarray(truncate_logits(jnp.asarray(logits), *columns, interpret=interpret, config=Config(*config)))


def check(logits: np.ndarray, options: list, config: tuple, interpret: bool) -> None:
    got = run(logits, options, config, interpret)
    if interpret:
        assert_no_races()
    wanted = reference.truncate_logits(logits, *(np.array(column) for column in zip(*options, strict=True)))
    mass = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    mass /= mass.sum(-1, keepdims=True)
    kept = np.isfinite(got)
    np.testing.assert_array_equal(got[kept], logits[kept])
    for row, (top_k, top_p, min_p) in enumerate(options):
        differing = kept[row] != np.isfinite(wanted[row])
        allowed = 0.0 if top_p >= 1 and min_p <= 0 else 5e-5
        assert mass[row, differing].sum() <= allowed, f"top_k={top_k} top_p={top_p} min_p={min_p}"


def test_kept_set():
    logits = np.random.default_rng(0).normal(0, 3, (len(OPTIONS), 1000)).astype(np.float32)
    check(logits, OPTIONS, (1, 2, 4, 8), interpret=True)


@pytest.mark.parametrize("options", [[(50, 1.0, 0.0)], [(0, 0.9, 0.0)], [(40, 0.95, 0.001)]])
def test_two_warpgroups_and_a_tail(options: list):
    logits = np.random.default_rng(1).normal(0, 3, (1, 2200)).astype(np.float32)
    check(logits, options, (2, 1, 4, 4, options[0][0] != 50), interpret=True)


def test_scans_that_drop_candidates():
    """Four slots for 128 threads, and rows whose values crowd: a scan alone cannot hold them."""
    rng = np.random.default_rng(2)
    few_values = rng.integers(0, 3, (2, 3000)).astype(np.float32)
    narrow = rng.normal(0, 1e-6, (1, 3000)).astype(np.float32) + 1
    logits = np.concatenate([few_values, narrow])
    check(logits, [(1500, 1.0, 0.0), (0, 0.6, 0.0), (0, 0.7, 0.0)], (1, 2, 4, 4), interpret=True)


def test_hard_rows():
    rng = np.random.default_rng(3)
    rows = rng.normal(0, 3, (5, 700)).astype(np.float32)
    rows[0] = 0.25
    rows[1, 100:] = -np.inf
    rows[2, 17] = 500.0  # far from anything that a sample sees
    rows[3] = np.sort(rows[3])
    rows[4] = -1e30 * np.arange(1, 701)
    options = [(5, 0.5, 0.0), (200, 0.9, 0.0), (0, 0.9, 0.0), (33, 1.0, 0.0), (3, 1.0, 0.0)]
    check(rows, options, (1, 2, 4, 8), interpret=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_without_a_finite_maximum_end(bad: float):
    logits = np.random.default_rng(4).normal(0, 3, (1, 512)).astype(np.float32)
    logits[0, 7] = bad
    assert run(logits, [(5, 0.5, 0.1)], (1, 2, 4, 8), interpret=True).shape == (1, 512)


@pytest.mark.parametrize("config", [pytest.param(config, marks=on_gpu) for config in CANDIDATES])
@pytest.mark.parametrize("vocab", [1000, *VOCABS.values()])
@pytest.mark.parametrize("kind", ["normal", "flat", "peaked", "bfloat16", "constant", "masked"])
def test_real_sizes(config: tuple, vocab: int, kind: str):
    from pallas_kernels.bench.truncation import _LOGITS

    base = np.random.default_rng(vocab).normal(0, 1, (28, vocab)).astype(np.float32)
    logits = np.asarray(_LOGITS[kind](jnp.asarray(base)))
    options = (OPTIONS * 2)[:28]
    check(logits, options, config, interpret=False)
    np.testing.assert_array_equal(run(logits, options, config, False), run(logits, options, config, False))
