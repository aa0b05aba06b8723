"""The matrix products against their references."""

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
#: Where a sum lies between two values of bfloat16, the kernel and the reference may round it either way.
TWO_ROUNDINGS = 2.0**-7


def operands(rows: int, depth: int, width: int, dtype) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(rows, depth)), dtype), jnp.asarray(rng.normal(size=(depth, width)), dtype)


def gated_operands(rows: int, depth: int, width: int, dtype) -> tuple[jax.Array, jax.Array]:
    """Both products of the size of 1, where silu is neither zero nor the identity."""
    x, w = operands(rows, depth, 2 * width, dtype)
    return x, (w.astype(jnp.float32) / depth**0.5).astype(dtype).reshape(depth, 2, width)


def check(got: jax.Array, x: jax.Array, w: jax.Array, allowed: float) -> None:
    define = reference.matmul if w.ndim == 2 else reference.gated_matmul
    wanted = define(np.asarray(x), np.asarray(w)).astype(np.float32)
    assert got.shape == wanted.shape
    assert np.max(np.abs(np.asarray(got, np.float32) - wanted)) <= allowed * np.max(np.abs(wanted))


@needs_mosaic
@pytest.mark.parametrize(
    ("columns", "dtype"), [*((columns, jnp.bfloat16) for columns in (64, 96, 128, 192, 256)), (96, jnp.float16)]
)
def test_kernel(columns: int, dtype):
    """Two tiles of rows, the second one half empty; more steps of K than stages."""
    from pallas_kernels.matmul import mosaic_gpu

    x, w = operands(ROWS, DEPTH, WIDTH, dtype)
    config = mosaic_gpu.Config(columns, 3)
    check(mosaic_gpu.matmul(x, w, config, interpret=True), x, w, 2.0**-8)


@needs_mosaic
@pytest.mark.parametrize(
    ("columns", "cluster", "dtype"), [(64, 1, jnp.float16), (128, 1, jnp.bfloat16), (128, 2, jnp.bfloat16)]
)
def test_gated_kernel(columns: int, cluster: int, dtype):
    from pallas_kernels.matmul import mosaic_gpu

    x, w = gated_operands(ROWS, DEPTH, 256, dtype)
    config = mosaic_gpu.Config(columns, 3, cluster)
    check(mosaic_gpu.gated_matmul(x, w, config, interpret=True), x, w, 2.0**-8)


@needs_mosaic
@pytest.mark.parametrize(("rows", "columns"), [(8, 64), (24, 96), (48, 128), (64, 192)])
def test_few_rows(rows: int, columns: int):
    """One warpgroup, whose rows beyond those that are there hold anything."""
    from pallas_kernels.matmul import mosaic_gpu

    x, w = operands(rows, DEPTH, 384, jnp.bfloat16)
    check(mosaic_gpu.matmul(x, w, mosaic_gpu.Config(columns, 3), interpret=True), x, w, 2.0**-8)
    if columns in (64, 128):
        x, w = gated_operands(rows, DEPTH, 256, jnp.bfloat16)
        check(mosaic_gpu.gated_matmul(x, w, mosaic_gpu.Config(columns, 3), interpret=True), x, w, 2.0**-8)


@needs_mosaic
@pytest.mark.parametrize(("rows", "ctas", "cluster"), [(320, 4, 1), (704, 6, 2), (704, 2, 2)])
def test_several_tiles_a_cta(monkeypatch, rows: int, ctas: int, cluster: int):
    """Tiles are taken in groups of two, the last group is lower, a cluster's second tile is empty."""
    from pallas_kernels.matmul import mosaic_gpu

    monkeypatch.setattr(mosaic_gpu, "_CTAS", ctas)
    monkeypatch.setattr(mosaic_gpu, "_GROUP_ROWS", 4 * mosaic_gpu.WARPGROUP_ROWS)
    x, w = operands(rows, 128, 384, jnp.bfloat16)
    check(mosaic_gpu.matmul(x, w, mosaic_gpu.Config(128, 3, cluster), interpret=True), x, w, 2.0**-8)


@needs_mosaic
def test_candidates_fit():
    from pallas_kernels.matmul import mosaic_gpu

    def found(*shape: int, gated: bool = False) -> list[tuple[int, int]]:
        return [(c.columns, c.cluster) for c in mosaic_gpu.candidates(*shape, gated=gated)]

    single = [(0, 1), (64, 1), (96, 1), (128, 1), (192, 1), (256, 1)]
    assert found(128, 4096, 6144) == single
    assert sorted(found(320, 4096, 6144)) == sorted([*single, (128, 2), (192, 2), (256, 2)])
    assert found(64, 4096, 4096) == [(0, 1), (64, 1), (128, 1), (256, 1)]
    assert found(192, 4096, 11008, gated=True) == [(0, 1), (64, 1), (128, 1), (128, 2)]
    assert found(8, 4096, 4096) == found(48, 4096, 4096) == found(64, 4096, 4096)
    assert found(96, 4096, 4096) == found(4, 4096, 4096) == found(64, 4100, 4096) == [(0, 1)]


@needs_mosaic
def test_only_tuned_cases_take_the_kernel(monkeypatch):
    from pallas_kernels.matmul import mosaic_gpu

    assert mosaic_gpu.tuned_config(512, 4096, 4096) is None
    best = mosaic_gpu.candidates(512, 4096, 4096)[2]
    assert best == mosaic_gpu.Config(128, 6)
    best_gated = mosaic_gpu.candidates(2048, 4096, 4096, gated=True)[2]
    monkeypatch.setattr(mosaic_gpu, "lookup", lambda kernel, *_: best if kernel == "matmul" else best_gated)
    assert mosaic_gpu.tuned_config(448, 4096, 4096) == best
    assert mosaic_gpu.tuned_config(100, 4096, 4096) is None
    assert mosaic_gpu.tuned_config(2048, 4096, 4096) is None
    assert mosaic_gpu.tuned_config(2048, 4096, 4096, gated=True) == best_gated


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_xla(dtype):
    x, w = operands(5, 96, 40, dtype)
    check(pallas_kernels.matmul(x, w, implementation="xla"), x, w, 2.0**-8 if dtype == jnp.bfloat16 else 1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_gated_xla(dtype):
    x, w = gated_operands(5, 96, 40, dtype)
    got = pallas_kernels.gated_matmul(x, w, implementation="xla")
    check(got, x, w, 2.0**-6 if dtype == jnp.bfloat16 else 1e-6)


@needs_mosaic
@pytest.mark.gpu
@pytest.mark.skipif(tuning.device_kind() is None, reason="needs a GPU")
@pytest.mark.parametrize("rows", [8, 48, 64, 320, 512, 2240])
def test_on_the_gpu(rows: int):
    from pallas_kernels.matmul import mosaic_gpu

    x, w = operands(rows, 4096, 6144, jnp.bfloat16)
    for config in mosaic_gpu.candidates(rows, 4096, 6144)[1:]:
        first = mosaic_gpu.matmul(x, w, config, interpret=False)
        check(first, x, w, TWO_ROUNDINGS)
        assert jnp.array_equal(mosaic_gpu.matmul(x, w, config, interpret=False), first)
    x, w = gated_operands(rows, 4096, 2816, jnp.bfloat16)
    for config in mosaic_gpu.candidates(rows, 4096, 2816, gated=True)[1:]:
        first = mosaic_gpu.gated_matmul(x, w, config, interpret=False)
        check(first, x, w, TWO_ROUNDINGS)
        assert jnp.array_equal(mosaic_gpu.gated_matmul(x, w, config, interpret=False), first)


def test_refuses():
    x, w = operands(4, 8, 8, jnp.bfloat16)
    with pytest.raises(ValueError, match="w has shape"):
        pallas_kernels.matmul(x, w[:4], implementation="xla")
    with pytest.raises(ValueError, match="w has dtype"):
        pallas_kernels.matmul(x, w.astype(jnp.float32), implementation="xla")
    with pytest.raises(ValueError, match="w has shape"):
        pallas_kernels.gated_matmul(x, w.reshape(8, 1, 8), implementation="xla")
