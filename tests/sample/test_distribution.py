"""What is drawn, often: the distribution is that of temperature, min_p, top_k and top_p."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pallas_kernels.implementation import MOSAIC_GPU, XLA
from vjax.sample.sampler import Variant, sample_tokens

ROWS, CALLS, VOCAB = 2000, 100, 100
NUM_DRAWS = ROWS * CALLS
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
CASES = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 1.9},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.05},
    "top_k_top_p": {"top_k": 40, "top_p": 0.9},
    "min_p_top_k": {"min_p": 0.02, "top_k": 20},
    "all": {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
}


def target(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """vLLM's order: temperature, min_p, top_k, top_p, each over what the one before has left."""
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p[p < min_p * p.max()] = 0
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize("implementation", [XLA, pytest.param(MOSAIC_GPU, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_distribution(name: str, implementation: str):
    params = {**OFF, **CASES[name]}
    logits = np.random.default_rng(1).normal(0, 1.5, VOCAB).astype(np.float32)
    variant = Variant.RANDOM if set(CASES[name]) <= {"temperature"} else Variant.FULL

    def column(value: float, dtype) -> jax.Array:
        return jnp.full(ROWS, value, dtype)

    draw = functools.partial(
        sample_tokens,
        jnp.broadcast_to(jnp.asarray(logits), (ROWS, VOCAB)),
        variant=variant,
        temperature=column(params["temperature"], jnp.float32),
        top_k=column(params["top_k"], jnp.int32),
        top_p=column(params["top_p"], jnp.float32),
        min_p=column(params["min_p"], jnp.float32),
        # A request in each row, a token of it in each call.
        seed_low=jnp.arange(ROWS, dtype=jnp.uint32),
        seed_high=jnp.zeros(ROWS, jnp.uint32),
        min_position=jnp.zeros(ROWS, jnp.int32),
        masked_ids=jnp.zeros((ROWS, 1), jnp.int32),
        implementation=implementation,
    )
    tokens = jax.jit(lambda: jax.lax.map(lambda i: draw(position=column(i, jnp.int32))[0], jnp.arange(CALLS)))()
    counts = np.bincount(np.asarray(tokens).reshape(-1), minlength=VOCAB)
    expected = target(logits, **params) * NUM_DRAWS
    assert counts[expected == 0].sum() == 0
    # Cells of at least five draws, as the test wants them; the rest is one cell.
    large = expected >= 5
    observed = [*counts[large], counts[~large].sum()]
    wanted = [*expected[large], expected[~large].sum()]
    if wanted[-1] < 5:
        observed[-2:], wanted[-2:] = [sum(observed[-2:])], [sum(wanted[-2:])]
    assert stats.chisquare(observed, wanted, sum_check=False).pvalue > 0.01 / (2 * len(CASES))
