"""Rope with the KV write: every implementation against the definition, and the register KV write."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hlo_checks import cache_copies
from pallas_kernels.kv_write import reference
from pallas_kernels.kv_write.rope import rope_write_kv
from tests.kernels.cases import IMPLEMENTATIONS, assert_no_races, needs_mosaic, on_gpu

# (q heads, KV heads, head dim of the model, of the cache, packed, normed)
SHAPES = [
    (8, 2, 64, 64, True, False),
    (8, 2, 64, 64, False, True),
    (6, 1, 128, 128, True, True),
    (3, 3, 64, 64, True, False),
    (14, 2, 64, 64, False, False),
    (4, 4, 80, 128, True, True),
]
REAL_SHAPES = [
    (32, 8, 128, 128, True, False),
    (32, 8, 128, 128, True, True),
    (28, 4, 128, 128, True, False),
    (32, 32, 128, 128, False, False),
    (16, 8, 256, 256, True, True),
    (8, 1, 128, 128, True, False),
]


def arguments(shape: tuple, num_tokens: int, seed: int = 0, dtype: str = "bfloat16") -> dict:
    """Arguments of rope_write_kv; some tokens have no slot."""
    heads, kv_heads, head_dim, cache_head_dim, packed, normed = shape
    rng = np.random.default_rng(seed)
    num_blocks = -(-num_tokens // 16) + 3

    def normal(*size: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(size, np.float32), dtype)

    angles = rng.uniform(0, 6.28, (num_tokens, head_dim // 2)).astype(np.float32)
    slots = rng.permutation(num_blocks * 16)[:num_tokens].astype(np.int32)
    slots[rng.random(num_tokens) < 0.2] = -1
    group = heads // kv_heads
    qkv = (
        normal(num_tokens, kv_heads, group + 2, head_dim)
        if packed
        else tuple(normal(num_tokens, n, head_dim) for n in (heads, kv_heads, kv_heads))
    )
    return {
        "qkv": qkv,
        "cos": jnp.cos(angles),
        "sin": jnp.sin(angles),
        "k_cache": normal(num_blocks, kv_heads, 16, cache_head_dim),
        "v_cache": normal(num_blocks, kv_heads, 16, cache_head_dim),
        "slots": jnp.asarray(slots),
        "q_norm": normal(head_dim) if normed else None,
        "k_norm": normal(head_dim) if normed else None,
    }


def wanted(given: dict) -> tuple[np.ndarray, ...]:
    """float32 arrays of the definition's results, zero-padded to the cache's head dim."""
    array = {name: None if x is None else np.asarray(x) for name, x in given.items() if name != "qkv"}
    qkv = given["qkv"]
    if not isinstance(qkv, tuple):
        packed = np.asarray(qkv)
        qkv = packed[:, :, :-2].reshape(packed.shape[0], -1, packed.shape[3]), packed[:, :, -2], packed[:, :, -1]
    q, k, v = (np.asarray(x) for x in qkv)
    head_dim, extra = q.shape[-1], array["k_cache"].shape[-1] - q.shape[-1]
    caches = [array.pop(name) for name in ("k_cache", "v_cache")]
    narrow = [cache[..., :head_dim] for cache in caches]
    new_q, *new = reference.rope_write_kv(q, k, v, k_cache=narrow[0], v_cache=narrow[1], **array)
    slots = array["slots"][array["slots"] >= 0]
    for cache, part in zip(caches, new, strict=True):
        cache = cache.copy()
        cache[slots // 16, :, slots % 16, head_dim:] = 0
        cache[..., :head_dim] = part
        caches = [*caches[1:], cache]
    new_q = np.pad(new_q.astype(np.float32), ((0, 0), (0, 0), (0, extra)))
    return new_q, *(cache.astype(np.float32) for cache in caches)


def check(implementation: str, shape: tuple, num_tokens: int) -> None:
    given = arguments(shape, num_tokens)
    want = wanted(given)
    got = rope_write_kv(**given, implementation=implementation)
    if implementation == "mosaic_gpu_interpret":
        assert_no_races()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=1e-2, atol=2e-2)
    # Values are only moved, and so exact.
    np.testing.assert_array_equal(np.asarray(got[2], np.float32), want[2])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_definition(implementation: str, shape: tuple):
    check(implementation, shape, 5)


@pytest.mark.parametrize("shape", [pytest.param(shape, marks=on_gpu) for shape in REAL_SHAPES])
@pytest.mark.parametrize("num_tokens", [1, 64, 2048])
def test_real_shapes(shape: tuple, num_tokens: int):
    check("mosaic_gpu", shape, num_tokens)


@needs_mosaic
@pytest.mark.parametrize("heads", [1, 2, 3, 8])
@pytest.mark.parametrize(("num_tokens", "tokens_per_cta"), [(1, 1), (7, 3), (6, 4)])
def test_register_write(heads: int, num_tokens: int, tokens_per_cta: int):
    from pallas_kernels.kv_write.mosaic_registers import Config, write_kv

    rng = np.random.default_rng(heads)
    caches = rng.standard_normal((2, 4, heads, 16, 64), np.float32).astype(jnp.bfloat16)
    new = rng.standard_normal((2, num_tokens, heads, 64), np.float32).astype(jnp.bfloat16)
    slots = rng.permutation(64)[:num_tokens].astype(np.int32)
    slots[num_tokens // 2] = -1 if num_tokens > 1 else slots[0]
    got = write_kv(*map(jnp.asarray, (*caches, *new, slots)), interpret=True, config=Config(tokens_per_cta))
    assert_no_races()
    for a, b in zip(got, reference.write_kv(*caches, *new, slots), strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)


def test_in_place():
    given = arguments((8, 2, 64, 64, True, False), 24, dtype="float32")
    names = tuple(given)
    cache = given["k_cache"]
    compiled = (
        jax.jit(
            lambda *values: rope_write_kv(**dict(zip(names, values, strict=True)), implementation="xla"),
            donate_argnums=(names.index("k_cache"), names.index("v_cache")),
        )
        .lower(*given.values())
        .compile()
    )
    assert cache_copies(compiled.as_text() or "", [cache.shape]) == []


def test_wrong_arguments():
    given = arguments((8, 2, 64, 64, True, True), 4)
    with pytest.raises(ValueError, match="give both or neither"):
        rope_write_kv(**{**given, "k_norm": None})
    with pytest.raises(ValueError, match=r"cos has shape \[3, 32\]; wanted \[4, 32\]"):
        rope_write_kv(**{**given, "cos": given["cos"][:3]})
    with pytest.raises(ValueError, match="at least 3"):
        rope_write_kv(**{**given, "qkv": given["qkv"][:, :, :2]})
    with pytest.raises(ValueError, match="head_dim is 128"):
        rope_write_kv(**{**given, "qkv": jnp.zeros((4, 2, 6, 128), jnp.bfloat16)})
    with pytest.raises(ValueError, match="v has dtype float32"):
        new = jnp.zeros((4, 2, 64), jnp.bfloat16)
        rope_write_kv(**{**given, "qkv": (new, new, new.astype(jnp.float32))})
