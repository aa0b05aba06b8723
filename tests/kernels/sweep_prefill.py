"""Checks and times configurations of the prefill kernel on a Hopper GPU: `python tests/kernels/sweep_prefill.py`.

One executable per configuration serves all cases, because the work is described by arrays. Prints one line per
configuration and check, and one per configuration and case: median device time (CUPTI) and TFLOP/s, counting
4 * heads * head_dim flops for each pair of a query and a key that it sees. Names given as arguments select
configurations; with `--fp8` first, the cache is float8_e4m3fn and the queries float16.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
import typing
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

import pallas_kernels
from pallas_kernels.ragged_paged_attention.mosaic_prefill import Config, default_config, prefill_attention
from pallas_kernels.ragged_paged_attention.plan_prefill import PrefillPlan, max_tiles, plan_prefill

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
TOKENS, CONTEXT, SEQS = 8192, 18432, 17
NUM_BLOCKS = CONTEXT // BLOCK_SIZE + 64
FP8 = sys.argv[1:2] == ["--fp8"]
Q_DTYPE, CACHE_DTYPE = (jnp.float16, jnp.float8_e4m3fn) if FP8 else (jnp.bfloat16, jnp.bfloat16)
SCALE = math.log(2)  # scores that are integers give weights that are powers of two
ITERATIONS = 15

CONFIGS = {
    "base": Config(),
    "not_persistent": Config(num_ctas=2048),
    "two_heads": Config(tile_tokens=64),
    "two_heads_not_persistent": Config(tile_tokens=64, num_ctas=2048),
    "keys64": Config(tile_keys=64, stages=4),
    "two_heads_keys64": Config(tile_tokens=64, tile_keys=64, stages=4),
    "wg3_keys64": Config(warpgroups=3, tile_tokens=192, tile_keys=64, stages=3, registers=(160, 32)),
    "four_heads": Config(tile_tokens=32),
}
if FP8:
    CONFIGS = {"fp8": default_config(HEAD_DIM, CACHE_DTYPE)}
CASES = {
    "1 x 8192": ([8192], [8192]),
    "4 x 2048": ([2048] * 4, [2048] * 4),
    "16 x 512": ([512] * 16, [512] * 16),
    "2048 on 16384": ([2048], [18432]),
}
RAGGED = ([700, 1, 33, 512, 5, 127, 128, 129, 64], [700, 1, 900, 512, 69, 2000, 128, 4097, 64])


def metadata(q_lens: Sequence[int], kv_lens: Sequence[int], seed: int = 0) -> tuple[np.ndarray, ...]:
    """block_tables, table_rows, cu_q_lens, kv_lens; padded to fixed shapes."""
    tables = np.zeros((SEQS + 1, CONTEXT // BLOCK_SIZE), np.int32)
    ids = iter(np.random.default_rng(seed).permutation(NUM_BLOCKS - 1) + 1)
    for row, length in enumerate(kv_lens):
        count = -(-length // BLOCK_SIZE)
        tables[row + 1, :count] = [next(ids) for _ in range(count)]
    padding = SEQS - len(q_lens)
    lens = np.pad(q_lens, (0, padding))
    rows = np.pad(np.arange(1, len(q_lens) + 1), (0, padding))
    starts = np.concatenate([[0], np.cumsum(lens)])
    return tables, rows.astype(np.int32), starts.astype(np.int32), np.pad(kv_lens, (0, padding)).astype(np.int32)


def make_plan(config: Config, arguments: tuple[np.ndarray, ...], num_tokens: int) -> PrefillPlan:
    """The plan of num_tokens tokens, with as many (unused) tiles as one of TOKENS tokens."""
    options = {"tile_tokens": config.tile_tokens, "block_size": BLOCK_SIZE}
    plan = plan_prefill(*map(jnp.asarray, arguments), num_tokens=num_tokens, **options)
    missing = max_tiles(TOKENS, SEQS, config.tile_tokens) - plan.tiles.shape[0]
    return PrefillPlan(plan.block_tables, jnp.pad(plan.tiles, ((0, missing), (0, 0))), plan.num_tiles, **options)


def executable(config: Config):
    def function(q, k_cache, v_cache, plan):
        return prefill_attention(q, k_cache, v_cache, plan, scale=SCALE, config=config)

    cache = jax.ShapeDtypeStruct((NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM), CACHE_DTYPE)
    q = jax.ShapeDtypeStruct((TOKENS, HEADS, HEAD_DIM), Q_DTYPE)
    plan = jax.eval_shape(lambda: make_plan(config, metadata([8], [8]), TOKENS))
    return jax.jit(function).lower(q, cache, cache, plan)


def random_inputs() -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    cache = (NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    q = jax.random.normal(keys[0], (TOKENS, HEADS, HEAD_DIM), jnp.bfloat16) * jnp.bfloat16(HEAD_DIM**-0.5)
    return [q.astype(Q_DTYPE), *(jax.random.normal(key, cache, jnp.bfloat16).astype(CACHE_DTYPE) for key in keys[1:])]


def poisoned(cache: jax.Array, arguments: tuple[np.ndarray, ...]) -> jax.Array:
    """NaN in every slot that holds no sequence's key."""
    tables, rows, _, kv_lens = arguments
    written = np.zeros((NUM_BLOCKS, BLOCK_SIZE), bool)
    for row, length in zip(rows, kv_lens, strict=True):
        position = np.arange(length)
        written[tables[row][position // BLOCK_SIZE], position % BLOCK_SIZE] = True
    return jnp.where(written[:, None, :, None], cache, jnp.asarray(jnp.nan, cache.dtype))


def wanted_ragged(inputs: list[jax.Array], arguments: tuple[np.ndarray, ...], num_tokens: int) -> np.ndarray:
    options: typing.Any = {
        "num_q_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "block_size": BLOCK_SIZE,
    }
    tables, rows, starts, kv_lens = arguments
    plan = pallas_kernels.plan_attention(
        tables[:, : -(-int(kv_lens.max()) // BLOCK_SIZE)],
        rows,
        starts,
        kv_lens,
        num_tokens=num_tokens,
        dtype=CACHE_DTYPE,
        decode_only=False,
        implementation="xla",
        **options,
    )
    q = inputs[0][:num_tokens]
    return np.asarray(
        pallas_kernels.ragged_paged_attention(q, inputs[1], inputs[2], plan, scale=SCALE).astype(jnp.float32)
    )


def exact_inputs(arguments: tuple[np.ndarray, ...], keys: int) -> tuple[list[jax.Array], np.ndarray]:
    """Integer scores and values of one sequence, and its exact outputs: f64[keys, HEADS, HEAD_DIM]."""
    rng = np.random.default_rng(7)
    exponent = rng.integers(0, 7, (HEADS, keys))
    values = rng.integers(-8, 9, (KV_HEADS, keys, HEAD_DIM))
    group = HEADS // KV_HEADS
    k_cache = np.zeros((NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM), np.float32)
    v_cache = np.zeros_like(k_cache)
    position = np.arange(keys)
    block, offset = arguments[0][1][position // BLOCK_SIZE], position % BLOCK_SIZE
    for head in range(KV_HEADS):
        k_cache[block, head, offset, :group] = -exponent[head * group : (head + 1) * group].T
        v_cache[block, head, offset] = values[head]
    q = np.zeros((TOKENS, HEADS, HEAD_DIM), np.float32)
    q[:, np.arange(HEADS), np.arange(HEADS) % group] = 1.0
    weights = 2.0**-exponent
    outputs = np.cumsum(weights[:, :, None] * np.repeat(values, group, axis=0), axis=1)
    outputs /= np.cumsum(weights, axis=1)[:, :, None]
    arrays = [jnp.asarray(q, Q_DTYPE), jnp.asarray(k_cache, CACHE_DTYPE), jnp.asarray(v_cache, CACHE_DTYPE)]
    return arrays, outputs.swapaxes(0, 1)


def check(name: str, config: Config, run, ragged, exact) -> None:
    arguments, num_tokens, inputs, wanted = ragged
    plan = make_plan(config, arguments, num_tokens)
    first = run(*inputs, plan)[:num_tokens]
    got = np.asarray(first.astype(jnp.float32))
    real = int(arguments[2][-1])
    norms = np.linalg.norm(wanted[:real], axis=(1, 2))
    error = np.max(np.linalg.norm(got[:real] - wanted[:real], axis=(1, 2)) / norms)
    same = all(bool(jnp.array_equal(run(*inputs, plan)[:num_tokens], first)) for _ in range(5))
    line = f"ragged: worst row {error:.1e}, padding zero {not got[real:].any()}, repeats bitwise {same}"
    arguments, keys, inputs, wanted = exact
    got = np.asarray(run(*inputs, make_plan(config, arguments, keys))[:keys].astype(jnp.float32))
    off = np.abs(got - wanted) > 2.0**-8 * np.abs(wanted) + 1e-6
    passed = error < 6e-3 and same and not off.any()
    print(f"{'ok  ' if passed else 'FAIL'} {name}: {line}, exact integers: {int(off.sum())} wrong", flush=True)


def time_case(name: str, config: Config, run, inputs, case: str) -> None:
    q_lens, kv_lens = CASES[case]
    plan = make_plan(config, metadata(q_lens, kv_lens), sum(q_lens))
    measured = profiler.Cupti(finalize=False).measure(run, aggregate=False, iterations=ITERATIONS)
    _, timings = measured(*inputs, plan)
    assert timings is not None, "CUPTI reported no kernel"
    times = [sum(ms for kernel, ms in one if "prefill_attention" in kernel) for one in typing.cast(list, timings)]
    milliseconds = statistics.median(times)
    pairs = sum(q * kv - q * (q - 1) / 2 for q, kv in zip(q_lens, kv_lens, strict=True))
    tflops = 4 * HEADS * HEAD_DIM * pairs / milliseconds / 1e9
    spread = f"{min(times) * 1e3:.0f}-{max(times) * 1e3:.0f}"
    print(f"     {name}, {case}: {milliseconds * 1e3:.1f} us ({spread}), {tflops:.0f} TFLOP/s", flush=True)


def main() -> None:
    names = sys.argv[1 + FP8 :] or list(CONFIGS)
    print(jax.devices()[0].device_kind, jax.__version__, flush=True)
    start = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        compiled = {name: pool.submit(lambda c: executable(c).compile(), CONFIGS[name]) for name in names}
        inputs = random_inputs()
        arguments = metadata(*RAGGED, seed=1)
        num_tokens = -(-sum(RAGGED[0]) // 64) * 64
        poison = [inputs[0], *(poisoned(cache, arguments) for cache in inputs[1:])]
        ragged = (arguments, num_tokens, poison, wanted_ragged(poison, arguments, num_tokens))
        arguments = metadata([1000], [1000])
        exact = (arguments, 1000, *exact_inputs(arguments, 1000))
        runs = {}
        for name in names:
            try:
                runs[name] = compiled[name].result()
            except Exception as error:
                print(f"FAIL {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    print(f"compiled and prepared in {time.perf_counter() - start:.0f} s", flush=True)
    for name, run in runs.items():
        check(name, CONFIGS[name], run, ragged, exact)
    for case in CASES:
        for name, run in runs.items():
            time_case(name, CONFIGS[name], run, inputs, case)
    print(f"done in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
