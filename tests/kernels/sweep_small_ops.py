"""Checks and times variants of the KV write, rope with the write, residual addition with norm, and sampling truncation
on a Hopper GPU.

`python tests/kernels/sweep_small_ops.py [kv] [rope] [norm] [truncation]`; without names all of them. Most of the time
is compilation: where the run is limited, take truncation, norm, and kv with rope, apart.
Chain: time of one of many dependent calls in one executable. Device: the kernels' own time, by CUPTI.
"""

from __future__ import annotations

import functools
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.add_rms_norm import mosaic_gpu as norm_mosaic
from pallas_kernels.add_rms_norm import reference as norm_reference
from pallas_kernels.add_rms_norm import xla as norm_xla
from pallas_kernels.bench import timing
from pallas_kernels.kv_write import mosaic_registers as kv_registers
from pallas_kernels.kv_write import reference as kv_reference
from pallas_kernels.kv_write import xla as kv_xla
from pallas_kernels.kv_write.rope import rope_write_kv
from pallas_kernels.sampling_truncation import mosaic_gpu as truncation_mosaic
from pallas_kernels.sampling_truncation import xla as truncation_xla

START = time.perf_counter()
BF16 = jnp.bfloat16
NUM_BLOCKS, BLOCK = 4000, 16


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:5.1f}] {text}", flush=True)


def guarded(function, *arguments):
    """One failing variant must not cost the others' figures."""
    try:
        return function(*arguments)
    except Exception as error:
        say(f"FAILED {function.__name__}{arguments[:2]}: {type(error).__name__} {str(error)[:600]}")
        traceback.print_exc(limit=-3)


def slots_of(num_tokens: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(NUM_BLOCKS * BLOCK - BLOCK)[:num_tokens].astype(np.int32) + BLOCK


def normal(*shape: int, seed: int = 0, dtype=BF16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def caches(kv_heads: int, head_dim: int) -> tuple[jax.Array, jax.Array]:
    shape = (NUM_BLOCKS, kv_heads, BLOCK, head_dim)
    return jnp.zeros(shape, BF16), jnp.zeros(shape, BF16)


def write_variants() -> dict:
    variants = {"xla": kv_xla.write_kv}
    for tokens in (1, 2, 4):
        config = kv_registers.Config(tokens)
        variants[f"registers/{tokens}"] = functools.partial(kv_registers.write_kv, interpret=False, config=config)
    # A jit of its own: the calls of a chain then share one lowering.
    return {name: jax.jit(write) for name, write in variants.items()}


def kernels_of(step, state, *arguments, length: int = 8) -> str:
    """Names and median times of the kernels of a short chain, copies of the undonated state left out."""

    def chain(state, *arguments):
        for _ in range(length):
            state = step(state, *arguments)
        return state

    compiled = jax.jit(chain)
    jax.block_until_ready(compiled(state, *arguments))
    by_name: dict[str, list[float]] = {}
    for kernel in timing.launches(lambda: compiled(state, *arguments)):
        by_name.setdefault(kernel.name[:40], []).append(kernel.seconds * 1e6)
    return ", ".join(f"{name} x{len(us)} {np.median(us):.2f}" for name, us in by_name.items())


def kv_write(num_tokens: int, kv_heads: int, head_dim: int, name: str, write) -> None:
    k, v = normal(num_tokens, kv_heads, head_dim), normal(num_tokens, kv_heads, head_dim, seed=1)
    slots = slots_of(num_tokens)
    checked = slots.copy()
    checked[:: max(2, num_tokens // 3)] = -1 if num_tokens > 1 else slots[0]
    got = write(*caches(kv_heads, head_dim), k, v, checked)
    zeros = np.zeros((NUM_BLOCKS, kv_heads, BLOCK, head_dim), BF16)
    want = kv_reference.write_kv(zeros, zeros, np.asarray(k), np.asarray(v), checked)
    right = all(np.array_equal(np.asarray(a), b) for a, b in zip(got, want, strict=True))

    def step(state, k, v, slots):
        return write(*state, k, v, slots)

    chain = timing.chain_seconds(step, caches(kv_heads, head_dim), (k, v, slots), short=10, long=50)
    moved = 4 * num_tokens * kv_heads * head_dim * 2
    names = kernels_of(step, caches(kv_heads, head_dim), k, v, slots)
    say(
        f"write_kv {kv_heads}x{head_dim} T={num_tokens} {name}: {'ok' if right else 'WRONG'} "
        f"chain {chain * 1e6:.2f} us ({moved / chain / 1e12:.2f} TB/s) kernels: {names}"
    )


def rope(num_tokens: int, heads: int, kv_heads: int, head_dim: int, packed: bool, normed: bool) -> None:
    group = heads // kv_heads
    qkv = normal(num_tokens, kv_heads, group + 2, head_dim)
    if not packed:
        qkv = tuple(normal(num_tokens, n, head_dim, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    angles = jax.random.uniform(jax.random.key(2), (num_tokens, head_dim // 2)) * 6
    cos, sin, slots = jnp.cos(angles), jnp.sin(angles), jnp.asarray(slots_of(num_tokens))
    norms: dict[str, Any] = {"q_norm": normal(head_dim), "k_norm": normal(head_dim, seed=3)} if normed else {}
    results, line = {}, []
    for implementation in ("xla", "mosaic_gpu"):

        def call(qkv, k_cache, v_cache, implementation=implementation):
            return rope_write_kv(qkv, cos, sin, k_cache, v_cache, slots, **norms, implementation=implementation)

        results[implementation] = jax.jit(call)(qkv, *caches(kv_heads, head_dim))

        def step(state, call=call):
            # The next step's heads depend on this step's queries, at a cost that both implementations share.
            qkv, k_cache, v_cache = state
            q, k_cache, v_cache = call(qkv, k_cache, v_cache)
            scale = q[0, 0, 0] * BF16(0) + BF16(1)
            return jax.tree.map(lambda x: x * scale, qkv), k_cache, v_cache

        state = jax.tree.map(jnp.copy, qkv), *caches(kv_heads, head_dim)
        chain = timing.chain_seconds(step, state, (), short=5, long=25)
        names = kernels_of(step, (qkv, *caches(kv_heads, head_dim)), length=4)
        line.append(f"{implementation} {chain * 1e6:.2f} us [{names}]")
    error = max(
        float(jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))))
        for a, b in zip(results["xla"], results["mosaic_gpu"], strict=True)
    )
    say(
        f"rope_write_kv {heads}/{kv_heads}x{head_dim} T={num_tokens} packed={packed} normed={normed}: "
        f"max difference {error:.4f}; " + "; ".join(line)
    )


def norm(num_tokens: int, size: int) -> None:
    """The stream and what is added to it, layer after layer; the sum is exact, so it is compared for equality."""
    default = norm_mosaic.default_config(num_tokens, size)
    variants = {"xla": functools.partial(norm_xla.add_rms_norm, eps=1e-5)}
    for config in norm_mosaic.configs(size):
        name = f"{config.warpgroups} wg, {config.tokens} tokens{' (default)' * (config == default)}"
        variants[name] = functools.partial(norm_mosaic.add_rms_norm, eps=1e-5, interpret=False, config=config)
    x, delta, weight = normal(num_tokens, size), normal(num_tokens, size, seed=1), normal(size, seed=2)
    want = [np.asarray(a) for a in norm_reference.add_rms_norm(*map(np.asarray, (x, delta, weight)), eps=1e-5)]
    inputs = [
        (normal(num_tokens, size, seed=i), normal(num_tokens, size, seed=i + 1), weight)
        for i in range(timing.rotations(4 * num_tokens * size))
    ]
    for name, function in variants.items():
        guarded(norm_variant, f"[{num_tokens}, {size}] {name}", jax.jit(function), (x, delta, weight), want, inputs)


def norm_variant(name: str, function, arguments: tuple, want: list, inputs: list) -> None:
    got = [np.asarray(a) for a in function(*arguments)]
    error = np.max(np.abs(got[1].astype(np.float32) - want[1].astype(np.float32)))
    x, delta, weight = arguments
    chain = timing.chain_seconds(lambda state, w: function(*state, w), (x + 0, delta + 0), (weight,), short=10, long=50)
    seconds = timing.device_seconds(function, inputs, iterations=20)
    say(
        f"add_rms_norm {name}: {'ok' if np.array_equal(got[0], want[0]) else 'WRONG SUM'}, max error {error:.4f}, "
        f"chain {chain * 1e6:.2f} us, device {seconds * 1e6:.2f} us ({8 * x.size / seconds / 1e12:.2f} TB/s)"
    )


Config = truncation_mosaic.Config
CONFIGS = {
    "2x2wg6": Config(2, 2, 6, 32, 88),
    "2x2wg4": Config(2, 2, 4, 32, 88),
    "2x2wg3": Config(2, 2, 3, 32, 88),
    "1x4wg6": Config(1, 4, 6, 16, 44),
    "1x4wg4": Config(1, 4, 4, 16, 44),
}
# (top_k, top_p, min_p)
CASES = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (50, 1.0, 0.0),
    (5000, 1.0, 0.0),
    (64000, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 0.5, 0.0),
    (0, 1.0, 0.05),
    (50, 0.9, 0.0),
    (50, 0.9, 0.02),
    (30000, 0.9, 0.0),
    (0, 0.99, 0.0),
    (0, 0.9, 0.02),
]
TIMED = {"normal*3": lambda x: x * 3}
HARD = {
    "flat": lambda x: x * 0.01,
    "bf16": lambda x: (x * 2).astype(BF16).astype(jnp.float32),
    "peaked": lambda x: x * 12,
    "constant": lambda x: x * 0,
    "masked": lambda x: jnp.where(x > 1, x, -jnp.inf),
}


def options(rows: int, case: tuple) -> tuple:
    k, p, m = case
    return jnp.full(rows, k, jnp.int32), jnp.full(rows, p, jnp.float32), jnp.full(rows, m, jnp.float32)


def differences(got, want, logits) -> tuple:
    """Largest differing probability mass and number of values per row, and whether kept values are unchanged."""
    mass = jax.nn.softmax(logits, axis=-1)
    differs = jnp.isfinite(got) != jnp.isfinite(want)
    same = jnp.all(jnp.where(jnp.isfinite(got), got == logits, True))
    return jnp.max(jnp.sum(jnp.where(differs, mass, 0), -1)), jnp.max(jnp.sum(differs, -1)), same


def compiled_variants(rows: int, vocab: int, names: list[str]) -> dict:
    """Compiled in parallel: name -> function of (logits, top_k, top_p, min_p)."""
    logits = jax.ShapeDtypeStruct((rows, vocab), jnp.float32)
    columns = [jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)]

    def compiled(name: str):
        function = functools.partial(truncation_mosaic.truncate_logits, interpret=False, config=CONFIGS[name])
        return guarded(lambda: jax.jit(function).lower(logits, *columns).compile())

    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(names, pool.map(compiled, names), strict=True))
    say(f"compiled {names} for [{rows}, {vocab}]")
    return {name: function for name, function in found.items() if function is not None}


def truncation(rows: int, vocab: int, variants: dict, cases: list, read: float) -> None:
    logits = jax.random.normal(jax.random.key(0), (rows, vocab)) * 3
    for name, function in variants.items():
        times = []
        for case in cases:
            seconds = timing.device_seconds(function, [(logits, *options(rows, case))], iterations=5)
            times.append(f"{case} {seconds * 1e6:.0f}")
        once = logits.nbytes / read * 1e6
        say(f"truncate [{rows}, {vocab}] {name}, us ({once:.1f} to read once): {'; '.join(times)}")


def truncation_correct(rows: int, vocab: int, variants: dict) -> None:
    compare = jax.jit(differences)
    oracle = jax.jit(truncation_xla.truncate_logits)
    per_row = [jnp.asarray(x) for x in zip(*[CASES[i % len(CASES)] for i in range(rows)], strict=True)]
    mixed = per_row[0].astype(jnp.int32), per_row[1].astype(jnp.float32), per_row[2].astype(jnp.float32)
    base = jax.random.normal(jax.random.key(3), (rows, vocab))
    for kind, change in (TIMED | HARD).items():
        logits = change(base)
        want = oracle(logits, *mixed)
        line = []
        for name, function in variants.items():
            got = function(logits, *mixed)
            again = function(logits, *mixed)
            mass, count, same = compare(got, want, logits)
            seconds = timing.device_seconds(function, [(logits, *mixed)], iterations=3)
            line.append(
                f"{name} mass {float(mass):.1e} values {int(count)} unchanged {bool(same)} "
                f"repeats {bool(jnp.array_equal(got, again))} {seconds * 1e6:.0f} us"
            )
        say(f"truncate {kind} [{rows}, {vocab}]: " + "; ".join(line))


def main(wanted: list[str]) -> None:
    wanted = wanted or ["kv", "rope", "norm", "truncation"]
    ceilings = timing.measure_ceilings()
    say(f"{jax.devices()[0].device_kind} jax {jax.__version__} {ceilings}")
    if "truncation" in wanted:
        some = [(0, 1.0, 0.0), (50, 1.0, 0.0), (0, 0.9, 0.0), (50, 0.9, 0.02)]
        for rows, vocab, names, cases, checks in (
            (256, 128256, list(CONFIGS), CASES, True),
            (64, 128256, ["1x4wg6", "1x4wg4"], some, False),
            (1, 128256, ["1x4wg6", "1x4wg4"], some, False),
            (256, 151936, ["2x2wg6"], some, True),
        ):
            variants = compiled_variants(rows, vocab, names)
            if checks:
                guarded(truncation_correct, rows, vocab, variants)
            guarded(truncation, rows, vocab, variants, cases, ceilings.read)
    if "kv" in wanted:
        variants = write_variants()
        for num_tokens, names in ((1, 2), (64, 2), (256, 3), (8192, 4)):
            for name in list(variants)[:names]:
                guarded(kv_write, num_tokens, 8, 128, name, variants[name])
        guarded(kv_write, 64, 32, 128, "registers/1", variants["registers/1"])
        guarded(kv_write, 64, 1, 128, "registers/1", variants["registers/1"])
    if "rope" in wanted:
        for num_tokens in (1, 64, 256, 8192):
            guarded(rope, num_tokens, 32, 8, 128, True, False)
        guarded(rope, 64, 32, 8, 128, True, True)
        guarded(rope, 64, 32, 8, 128, False, False)
        guarded(rope, 64, 16, 8, 256, True, False)
        guarded(rope, 64, 28, 4, 128, True, False)
        guarded(rope, 64, 8, 1, 128, True, False)
    if "norm" in wanted:
        for num_tokens in (1, 8, 64, 256, 8192):
            guarded(norm, num_tokens, 4096)
        for size in (2048, 5120, 8192):
            for num_tokens in (1, 256, 8192):
                guarded(norm, num_tokens, size)
    say("done")


if __name__ == "__main__":
    main(sys.argv[1:])
