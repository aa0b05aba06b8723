"""KV write: every implementation against the token-by-token definition, and in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.hlo_checks import cache_copies
from pallas_kernels.implementation import MOSAIC_GPU_INTERPRET
from pallas_kernels.kv_write import reference
from pallas_kernels.kv_write.shapes import HEADS, NUM_TOKENS
from tests.kernels.cases import IMPLEMENTATIONS, assert_no_races, needs_mosaic, on_gpu


def check(implementation: str, num_blocks: int, cache_shape: tuple[int, int, int], num_tokens: int, dtype: str) -> None:
    num_kv_heads, block_size, head_dim = cache_shape
    rng = np.random.default_rng(0)
    k_cache, v_cache = rng.standard_normal((2, num_blocks, *cache_shape), np.float32)
    k, v = rng.standard_normal((2, num_tokens, num_kv_heads, head_dim), np.float32)
    slots = rng.permutation(num_blocks * block_size)[:num_tokens].astype(np.int32)
    slots[rng.random(num_tokens) < 0.3] = -1
    slots[-1] = num_blocks * block_size - 1 if num_blocks * block_size - 1 not in slots else slots[-1]
    k_cache, v_cache, k, v = (jnp.asarray(x, dtype) for x in (k_cache, v_cache, k, v))
    wanted = reference.write_kv(np.asarray(k_cache), np.asarray(v_cache), np.asarray(k), np.asarray(v), slots)
    got = pallas_kernels.write_kv(k_cache, v_cache, k, v, jnp.asarray(slots), implementation=implementation)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)
    if implementation == MOSAIC_GPU_INTERPRET:
        assert_no_races()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("cache_shape", "num_tokens"), [((2, 16, 64), 1), ((1, 128, 64), 40), ((3, 32, 128), 29), ((2, 16, 128), 270)]
)
def test_written_where_slots_say(implementation: str, cache_shape: tuple[int, int, int], num_tokens: int):
    check(implementation, 20, cache_shape, num_tokens, "bfloat16")


@pytest.mark.parametrize("model", [pytest.param(model, marks=on_gpu) for model in ("llama3_8b", "gemma2_9b")])
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_real_sizes(model: str, num_tokens: int):
    num_kv_heads, head_dim = HEADS[model]
    check("mosaic_gpu", 600, (num_kv_heads, 16, head_dim), num_tokens, "bfloat16")


@pytest.mark.gpu
@needs_mosaic
def test_many_heads_on_gpu():
    check("mosaic_gpu", 300, (32, 64, 256), 8192, "bfloat16")


def test_new_values_are_converted_to_the_cache_dtype():
    cache = jnp.zeros((3, 1, 16, 4), jnp.float32)
    new = jnp.ones((1, 1, 4), jnp.bfloat16)
    k_cache, _ = pallas_kernels.write_kv(cache, cache, new, new, jnp.array([17], jnp.int32), implementation="xla")
    assert k_cache.dtype == jnp.float32
    assert float(k_cache[1, 0, 1].sum()) == 4 == float(k_cache.sum())


CACHE_SHAPE = (509, 2, 16, 32)


def compiled_step(plant) -> str:
    """Optimised HLO of a donated write and a read of the cache through attention, on the CPU."""

    def step(k_cache, v_cache, q, k, v, slots, table, plan_arrays):
        k_cache, v_cache = pallas_kernels.write_kv(k_cache, v_cache, k, v, slots, implementation="xla")
        plan = pallas_kernels.plan_attention(
            table,
            *plan_arrays,
            num_tokens=24,
            num_q_heads=4,
            num_kv_heads=2,
            head_dim=32,
            block_size=16,
            dtype=jnp.float32,
            decode_only=False,
            implementation="xla",
        )
        output = pallas_kernels.ragged_paged_attention(q, k_cache, v_cache, plan, scale=1.0)
        return plant(k_cache), v_cache, output

    cache = jax.ShapeDtypeStruct(CACHE_SHAPE, jnp.float32)
    new = jax.ShapeDtypeStruct((24, 2, 32), jnp.float32)
    ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in [(24,), (5, 9), (4,), (5,), (4,)]]
    q = jax.ShapeDtypeStruct((24, 4, 32), jnp.float32)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(cache, cache, q, new, new, ints[0], ints[1], tuple(ints[2:]))
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    if memory is not None and plant is identity:
        assert memory.temp_size_in_bytes < np.prod(CACHE_SHAPE) * 4
    text = compiled.as_text()
    assert text
    return text


def identity(cache: jax.Array) -> jax.Array:
    return cache


def test_step_is_in_place():
    assert cache_copies(compiled_step(identity), [CACHE_SHAPE]) == []


@pytest.mark.parametrize(
    "plant",
    [
        lambda cache: jnp.swapaxes(jnp.swapaxes(cache, 1, 2) + 1, 1, 2),
        lambda cache: cache.astype(jnp.bfloat16),
        lambda cache: jnp.swapaxes(cache, 0, 1),
        lambda cache: jnp.flip(cache, 0),
    ],
    ids=["copy", "convert", "transpose", "reverse"],
)
def test_planted_copy_is_found(plant):
    assert cache_copies(compiled_step(plant), [CACHE_SHAPE])


def test_cache_copies_reads_instructions():
    lines = [
        "  %copy.1 = f32[4,2,16,8]{3,2,1,0} copy(%x)",
        "  ROOT %t = f32[2,4,16,8]{3,2,1,0} transpose(%x), dimensions={1,0,2,3}",
        '  %flat = bf16[1024]{0} convert(%x), metadata={op_name="a"}',
        "  %s = (f32[4,2,16,8]{3,2,1,0}, f32[4,2,16,8]{3,2,1,0}, u32[]) copy-start(%x)",
        "  %other = f32[4,2,16,9]{3,2,1,0} copy(%x)",
        "  %fusion = f32[4,2,16,8]{3,2,1,0} fusion(%x), kind=kLoop, calls=%copy(",
        "  %p = f32[4,2,16,8]{3,2,1,0} parameter(0)",
    ]
    assert cache_copies("\n".join(lines), [(4, 2, 16, 8)]) == [line.strip() for line in lines[:4]]


def test_wrong_arguments():
    cache = jnp.zeros((3, 2, 16, 8))
    new, slots = jnp.zeros((5, 2, 8)), jnp.zeros(5, jnp.int32)
    with pytest.raises(ValueError, match=r"k has shape \[5, 2, 8\]; wanted \[4, 2, 8\]"):
        pallas_kernels.write_kv(cache, cache, new, new, slots[:4])
    with pytest.raises(ValueError, match="slots has dtype float32; wanted int32"):
        pallas_kernels.write_kv(cache, cache, new, new, jnp.zeros(5))
    with pytest.raises(ValueError, match="block_size is 8; allowed: 16, 32, 64, 128"):
        pallas_kernels.write_kv(cache[:, :, :8], cache[:, :, :8], new, new, slots)
    with pytest.raises(ValueError, match="v_cache has dtype"):
        pallas_kernels.write_kv(cache, cache.astype(jnp.bfloat16), new, new, slots)
    with pytest.raises(ValueError, match="implementation is 'cuda'"):
        pallas_kernels.write_kv(cache, cache, new, new, slots, implementation="cuda")
    with pytest.raises(NotImplementedError, match="xla"):
        pallas_kernels.write_kv(cache, cache, new, new, slots, implementation="mosaic_gpu")
