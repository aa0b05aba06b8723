"""The matrix product against its reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import tuning
from pallas_kernels.matmul import reference
from tests.kernels.cases import needs_mosaic

ROWS, DEPTH, WIDTH = 192, 256, 768


def operands(rows: int, depth: int, width: int, dtype) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(rows, depth)), dtype), jnp.asarray(rng.normal(size=(depth, width)), dtype)


def check(got: jax.Array, x: jax.Array, w: jax.Array, allowed: float) -> None:
    wanted = reference.matmul(np.asarray(x), np.asarray(w)).astype(np.float32)
    assert np.max(np.abs(np.asarray(got, np.float32) - wanted)) <= allowed * np.max(np.abs(wanted))


@needs_mosaic
@pytest.mark.parametrize("columns", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_kernel(columns: int, dtype):
    """Two tiles of rows, the second one half empty; more steps of K than stages."""
    from pallas_kernels.matmul import mosaic_gpu

    x, w = operands(ROWS, DEPTH, WIDTH, dtype)
    config = mosaic_gpu.Config(columns, 3)
    check(mosaic_gpu.matmul(x, w, config, interpret=True), x, w, 2.0**-8)


@needs_mosaic
def test_candidates_fit():
    from pallas_kernels.matmul import mosaic_gpu

    assert [c.columns for c in mosaic_gpu.candidates(320, 4096, 6144)] == [0, 64, 96, 128, 192, 256]
    assert [c.columns for c in mosaic_gpu.candidates(512, 4096, 4096)] == [0, 64, 128, 256]
    assert mosaic_gpu.candidates(96, 4096, 4096) == mosaic_gpu.candidates(64, 4100, 4096) == [mosaic_gpu.XLA_PRODUCT]


@needs_mosaic
def test_only_tuned_cases_take_the_kernel(monkeypatch):
    from pallas_kernels.matmul import mosaic_gpu

    assert mosaic_gpu.tuned_config(512, 4096, 4096) is None
    best = mosaic_gpu.candidates(512, 4096, 4096)[2]
    monkeypatch.setattr(mosaic_gpu, "lookup", lambda *_: best)
    assert mosaic_gpu.tuned_config(448, 4096, 4096) == best
    assert mosaic_gpu.tuned_config(100, 4096, 4096) is None


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_xla(dtype):
    x, w = operands(5, 96, 40, dtype)
    check(pallas_kernels.matmul(x, w, implementation="xla"), x, w, 2.0**-8 if dtype == jnp.bfloat16 else 1e-6)


@needs_mosaic
@pytest.mark.gpu
@pytest.mark.skipif(tuning.device_kind() is None, reason="needs a GPU")
@pytest.mark.parametrize("rows", [64, 320, 512])
def test_on_the_gpu(rows: int):
    from pallas_kernels.matmul import mosaic_gpu

    x, w = operands(rows, 4096, 6144, jnp.bfloat16)
    for config in mosaic_gpu.candidates(rows, 4096, 6144)[1:]:
        first = mosaic_gpu.matmul(x, w, config, interpret=False)
        check(first, x, w, 2.0**-8)
        assert jnp.array_equal(mosaic_gpu.matmul(x, w, config, interpret=False), first)


def test_refuses():
    x, w = operands(4, 8, 8, jnp.bfloat16)
    with pytest.raises(ValueError, match="w has shape"):
        pallas_kernels.matmul(x, w[:4], implementation="xla")
    with pytest.raises(ValueError, match="w has dtype"):
        pallas_kernels.matmul(x, w.astype(jnp.float32), implementation="xla")
