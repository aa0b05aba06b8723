"""Sampling truncation: every implementation against the sorted float64 definition."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.implementation import MOSAIC_GPU_INTERPRET
from pallas_kernels.sampling_truncation import reference
from pallas_kernels.sampling_truncation.shapes import VOCABS
from tests.kernels.cases import IMPLEMENTATIONS, assert_no_races, on_gpu

# (top_k, top_p, min_p)
OPTIONS = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (50, 1.0, 0.0),
    (10**6, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 0.5, 0.0),
    (0, 0.0, 0.0),
    (0, 0.999, 0.0),
    (0, 1.0, 0.05),
    (0, 1.0, 1.0),
    (40, 0.95, 0.0),
    (-1, 2.0, -1.0),
    (20, 0.8, 0.01),
    (5, 0.99, 0.2),
]


def run(implementation: str, logits: np.ndarray, options: list[tuple[int, float, float]]) -> np.ndarray:
    top_k, top_p, min_p = (np.array(column) for column in zip(*options, strict=True))
    arguments = (top_k.astype(np.int32), top_p.astype(np.float32), min_p.astype(np.float32))
    got = pallas_kernels.truncate_logits(
        jnp.asarray(logits), *map(jnp.asarray, arguments), implementation=implementation
    )
    if implementation == MOSAIC_GPU_INTERPRET:
        assert_no_races()
    return np.asarray(got)


def check(implementation: str, logits: np.ndarray, options: list[tuple[int, float, float]]) -> None:
    got = run(implementation, logits, options)
    wanted = reference.truncate_logits(logits, *(np.array(column) for column in zip(*options, strict=True)))
    mass = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    mass /= mass.sum(-1, keepdims=True)
    kept = np.isfinite(got)
    np.testing.assert_array_equal(got[kept], logits[kept])
    assert kept.any(-1).all()
    for row, (top_k, top_p, min_p) in enumerate(options):
        differing = kept[row] != np.isfinite(wanted[row])
        # float32 sums and logarithms move a threshold by rounding; counts are exact.
        allowed = 0.0 if top_p >= 1 and min_p <= 0 else 5e-5
        assert mass[row, differing].sum() <= allowed, f"top_k={top_k} top_p={top_p} min_p={min_p}"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_kept_set(implementation: str):
    logits = np.random.default_rng(1283).normal(0, 3, (len(OPTIONS), 1283)).astype(np.float32)
    check(implementation, logits, OPTIONS)


@pytest.mark.parametrize("vocab", [pytest.param(vocab, marks=on_gpu) for vocab in VOCABS.values()])
@pytest.mark.parametrize("spread", [0.01, 3.0, 30.0])
def test_real_sizes(vocab: int, spread: float):
    logits = np.random.default_rng(vocab).normal(0, spread, (64, vocab)).astype(np.float32)
    check("mosaic_gpu", logits, (OPTIONS * 5)[:64])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ties_are_kept(implementation: str):
    logits = np.array([[2.0, 1.0, 1.0, 1.0, 0.0, -0.0, -1.0, -1.0]], np.float32).repeat(4, 0)
    options = [(2, 1.0, 0.0), (0, 0.5, 0.0), (5, 1.0, 0.0), (0, 1.0, 0.9)]
    kept = np.isfinite(run(implementation, logits, options)).sum(-1)
    # probabilities: 0.40, three of 0.15, two of 0.05 (both zeros are equal), two of 0.02
    np.testing.assert_array_equal(kept, [4, 4, 6, 1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masked_and_negative_logits(implementation: str):
    logits = np.full((3, 200), -np.inf, np.float32)
    logits[:, 5:9] = [-1e30, -50.0, -51.0, -1000.0]
    kept = np.isfinite(run(implementation, logits, [(2, 1.0, 0.0), (0, 0.9, 0.0), (50, 0.6, 0.0)]))
    np.testing.assert_array_equal(kept.sum(-1), [2, 2, 1])
    assert kept[:, 6].all()


def test_wrong_arguments():
    logits, ints, floats = jnp.zeros((2, 8)), jnp.zeros(2, jnp.int32), jnp.zeros(2)
    with pytest.raises(ValueError, match="top_k has dtype float32; wanted int32"):
        pallas_kernels.truncate_logits(logits, floats, floats, floats)
    with pytest.raises(ValueError, match=r"top_p has shape \[1\]; wanted \[2\]"):
        pallas_kernels.truncate_logits(logits, ints, floats[:1], floats)
    with pytest.raises(ValueError, match="logits has dtype bfloat16"):
        pallas_kernels.truncate_logits(logits.astype(jnp.bfloat16), ints, floats, floats)
