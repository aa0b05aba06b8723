"""Residual addition with RMS norm: every implementation against the definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import add_rms_norm
from pallas_kernels.add_rms_norm import reference
from pallas_kernels.add_rms_norm.shapes import HIDDEN
from tests.kernels.cases import IMPLEMENTATIONS, assert_no_races, needs_mosaic, on_gpu

TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 2e-6}
EPS = 1e-5


def arguments(num_tokens: int, size: int, dtype: str, weight_dtype: str | None = None) -> tuple[jax.Array, ...]:
    """Rows of very different sizes, one of them all zeros."""
    rng = np.random.default_rng(size)
    x, delta = rng.standard_normal((2, num_tokens, size), np.float32) * 2.0 ** rng.integers(-6, 6, (num_tokens, 1))
    x[-1], delta[-1] = 0, 0
    weight = rng.standard_normal(size, np.float32) + 1
    return jnp.asarray(x, dtype), jnp.asarray(delta, dtype), jnp.asarray(weight, weight_dtype or dtype)


def check(got: tuple[jax.Array, jax.Array], given: tuple[jax.Array, ...]) -> None:
    want = reference.add_rms_norm(*map(np.asarray, given), eps=EPS)
    np.testing.assert_array_equal(np.asarray(got[0], np.float32), want[0].astype(np.float32))
    assert got[0].dtype == got[1].dtype == given[0].dtype
    tolerance = TOLERANCE[given[0].dtype.name]
    np.testing.assert_allclose(
        np.asarray(got[1], np.float32), want[1].astype(np.float32), rtol=tolerance, atol=tolerance / 10
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("num_tokens", "size", "dtype", "weight_dtype"),
    [
        (1, 128, "bfloat16", None),
        (5, 1024, "bfloat16", None),
        (3, 896, "float16", None),
        (2, 4096, "float32", None),
        (3, 640, "bfloat16", "float32"),
        (4, 72, "bfloat16", None),
    ],
)
def test_against_definition(implementation: str, num_tokens: int, size: int, dtype: str, weight_dtype: str | None):
    given = arguments(num_tokens, size, dtype, weight_dtype)
    check(add_rms_norm(*given, eps=EPS, implementation=implementation), given)
    if implementation == "mosaic_gpu_interpret":
        assert_no_races()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_of_the_weights_of_all_layers(implementation: str):
    x, delta, weight = arguments(3, 256, "bfloat16")
    stacked = jnp.stack([weight + 1, weight, weight - 1])
    got = add_rms_norm(x, delta, stacked, eps=EPS, layer=1, implementation=implementation)
    check(got, (x, delta, weight))
    for one, other in zip(got, add_rms_norm(x, delta, weight, eps=EPS, implementation=implementation), strict=True):
        assert jnp.array_equal(one, other)


@needs_mosaic
@pytest.mark.parametrize(("warpgroups", "tokens", "size"), [(1, 4, 384), (2, 2, 1024), (3, 1, 768), (4, 4, 512)])
def test_configs(warpgroups: int, tokens: int, size: int):
    """The last CTA has fewer tokens; warps in numbers that are no power of two."""
    from pallas_kernels.add_rms_norm import mosaic_gpu

    given = arguments(5, size, "bfloat16")
    config = mosaic_gpu.Config(warpgroups, tokens)
    check(mosaic_gpu.add_rms_norm(*given, eps=EPS, interpret=True, config=config), given)
    assert_no_races()


@needs_mosaic
def test_default_configs():
    from pallas_kernels.add_rms_norm.mosaic_gpu import Config, default_config, supports

    assert [default_config(1, size).warpgroups for size in HIDDEN.values()] == [7, 3, 2, 5, 3, 7, 4, 5, 8]
    assert [default_config(8192, size).warpgroups for size in HIDDEN.values()] == [1, 1, 1, 1, 1, 1, 1, 1, 2]
    assert default_config(8192, 16384) == Config(4) and default_config(1, 16384, 4) == Config(4)
    assert all(supports(size, itemsize) for size in range(128, 6144 + 1, 128) for itemsize in (2, 4))
    assert not supports(72, 2) and not supports(1 << 15, 2)


@pytest.mark.parametrize("size", [pytest.param(size, marks=on_gpu) for size in HIDDEN.values()])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_real_shapes(size: int, dtype: str):
    for num_tokens in (1, 8, 67, 2048):
        given = arguments(num_tokens, size, dtype)
        check(add_rms_norm(*given, eps=EPS, implementation="mosaic_gpu"), given)


@pytest.mark.parametrize("size", [pytest.param(size, marks=on_gpu) for size in HIDDEN.values()])
def test_all_configs(size: int):
    from pallas_kernels.add_rms_norm import mosaic_gpu

    for config in mosaic_gpu.configs(size):
        for num_tokens in (1, 67):
            given = arguments(num_tokens, size, "bfloat16")
            check(mosaic_gpu.add_rms_norm(*given, eps=EPS, interpret=False, config=config), given)


def test_wrong_arguments():
    x, delta, weight = arguments(4, 128, "bfloat16")
    with pytest.raises(ValueError, match=r"delta has shape \[3, 128\]; wanted \[4, 128\]"):
        add_rms_norm(x, delta[:3], weight, eps=EPS)
    with pytest.raises(ValueError, match="delta has dtype float32; wanted bfloat16"):
        add_rms_norm(x, delta.astype(jnp.float32), weight, eps=EPS)
    with pytest.raises(ValueError, match=r"weight has shape \[64\]; wanted \[128\]"):
        add_rms_norm(x, delta, weight[:64], eps=EPS)
    with pytest.raises(ValueError, match=r"weight has shape \[128\]; wanted \[\?, 128\]"):
        add_rms_norm(x, delta, weight, eps=EPS, layer=0)
    with pytest.raises(ValueError, match=r"layer has shape \[2\]; wanted \[\]"):
        add_rms_norm(x, delta, weight[None], eps=EPS, layer=np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="weight has dtype int32"):
        add_rms_norm(x, delta, weight.astype(jnp.int32), eps=EPS)
