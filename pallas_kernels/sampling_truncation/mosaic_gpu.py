"""Sampling truncation for Hopper in Pallas Mosaic GPU: one CTA per row, which stays in the L2 while it is searched.

Every pass over the row evaluates three pivots and so takes two bits of the threshold; top-k and top-p each need at
most 16 passes. Rows that need no truncation are only copied.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_WARPGROUPS = 4
_THREADS = 128
_CHUNK = 16 * _THREADS  # values that a warpgroup loads at once
_PIVOTS = 3
_LOG2E = math.log2(math.e)


def truncate_logits(
    logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array, *, interpret: bool
) -> jax.Array:
    """See api.truncate_logits; `interpret` runs the kernel on the CPU with race detection."""
    rows, vocab = logits.shape
    log_min_p = jnp.where(min_p > 0, jnp.log(jnp.maximum(min_p, 1e-38)), -jnp.inf)
    padded = jnp.pad(logits, ((0, 0), (0, -vocab % _THREADS)), constant_values=-jnp.inf)
    kernel = plgpu.kernel(
        functools.partial(_kernel, vocab),
        out_type=jax.ShapeDtypeStruct(padded.shape, jnp.float32),
        scratch_types=[
            plgpu.SMEM((2 * _WARPGROUPS * _PIVOTS,), jnp.float32),
            plgpu.Barrier(num_arrivals=_WARPGROUPS),
        ],
        grid=(rows,),
        grid_names=("row",),
        num_threads=_WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name="truncate_logits",
    )
    return kernel(padded, top_k, top_p, log_min_p)[:, :vocab]


def _kernel(vocab: int, logits: Any, top_k: Any, top_p: Any, log_min_p: Any, output: Any, smem: Any, barrier: Any) -> None:
    """Body of one CTA. Pass numbers alternate between the halves of `smem`, so one barrier a pass is enough."""
    row, warpgroup = lax.axis_index("row"), lax.axis_index("warpgroup")
    k, p, log_m = top_k[row], top_p[row], log_min_p[row]
    reduce_row = functools.partial(_reduce_row, logits.at[row], warpgroup)
    share = functools.partial(_share, smem, barrier, warpgroup)
    uses_k, uses_p = (k > 0) & (k < vocab), p < 1.0

    def threshold() -> jax.Array:
        (maximum,) = share(jnp.int32(0), reduce_row(lambda x: (x,), jnp.maximum, -jnp.inf, 1), jnp.maximum)
        low, high = _ordered(maximum + log_m), _ordered(maximum)

        def count(x: jax.Array, pivot: jax.Array) -> jax.Array:
            return jnp.where(x >= pivot, 1.0, 0.0)

        def mass(x: jax.Array, pivot: jax.Array) -> jax.Array:
            return jnp.where(x >= pivot, jnp.exp2((x - maximum) * _LOG2E), 0.0)

        def sums(measure: Callable, number: Any, pivots: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            values = tuple(_value(pivot) for pivot in pivots)
            parts = reduce_row(lambda x: tuple(measure(x, value) for value in values), jnp.add, 0.0, len(pivots))
            return share(number, parts, jnp.add)

        number = jnp.int32(1)
        low, number = lax.cond(
            uses_k,
            lambda: _search(functools.partial(sums, count), k.astype(jnp.float32), low, high, number),
            lambda: (low, number),
        )

        def with_top_p() -> tuple[jax.Array, jax.Array]:
            (total,) = sums(mass, number, (low,))
            return _search(functools.partial(sums, mass), p * total, low, high, number + 1)

        low, number = lax.cond(uses_p, with_top_p, lambda: (low, number))
        return _value(low)

    lowest = lax.cond(uses_k | uses_p | (log_m > -jnp.inf), threshold, lambda: jnp.float32(-jnp.inf))

    _store_kept(logits.at[row], output.at[row], warpgroup, lowest)


def _search(
    sums: Callable, target: jax.Array, low: jax.Array, high: jax.Array, number: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(the largest ordered value in [low, high] from which on the row sums to the target, next pass number).

    The sum from `low` on is taken to reach the target.
    """

    def narrow(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        low, high, number = state
        middle = _middle(low, high)
        pivots = (_middle(low, middle - 1), middle, _middle(middle, high))
        found = sums(number, pivots)
        for pivot, total in zip(pivots, found, strict=True):
            reached = total >= target
            low = jnp.where(reached, jnp.maximum(low, pivot), low)
            high = jnp.where(reached, high, jnp.minimum(high, pivot - 1))
        return low, high, number + 1

    low, _, number = lax.while_loop(lambda state: state[0] < state[1], narrow, (low, high, number))
    return low, number


def _middle(low: jax.Array, high: jax.Array) -> jax.Array:
    """The mean, rounded up, without overflow."""
    return (low | high) - ((low ^ high) >> 1)


def _ordered(value: jax.Array) -> jax.Array:
    """int32 that compares like the float32."""
    bits = lax.bitcast_convert_type(value, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _value(ordered: jax.Array) -> jax.Array:
    """The float32 of an ordered int32."""
    return lax.bitcast_convert_type(jnp.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered), jnp.float32)


def _layout(size: int) -> Any:
    per_thread = size // _THREADS
    return plgpu.Layout.WG_STRIDED((size,), vec_size=math.gcd(per_thread, 4))


def _load(row: Any, start: Any, size: int) -> jax.Array:
    return plgpu.load(row.at[pl.ds(start, size)], layout=_layout(size), optimized=False)


def _reduce_row(
    row: Any, warpgroup: Any, function: Callable, combine: Callable, identity: float, results: int
) -> tuple[jax.Array, ...]:
    """Scalars: this warpgroup's part of the row through `function` (array -> `results` arrays), combined."""
    reduce = {jnp.add: jnp.sum, jnp.maximum: jnp.max}[combine]
    chunks, tail = divmod(row.shape[0], _CHUNK)

    def step(i: Any, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        values = function(_load(row, _chunk_start(i, warpgroup), _CHUNK))
        return tuple(combine(part, value) for part, value in zip(parts, values, strict=True))

    empty = plgpu.layout_cast(jnp.full((_CHUNK,), identity, jnp.float32), _layout(_CHUNK))
    found = tuple(map(reduce, lax.fori_loop(0, _trips(chunks, warpgroup), step, (empty,) * results)))
    if tail:
        extra = tuple(map(reduce, function(_load(row, chunks * _CHUNK, tail))))
        mine = warpgroup == chunks % _WARPGROUPS
        found = tuple(combine(a, jnp.where(mine, b, identity)) for a, b in zip(found, extra, strict=True))
    return found


def _store_kept(row: Any, output: Any, warpgroup: Any, lowest: jax.Array) -> None:
    """Writes this warpgroup's part of the row with -inf for what lies below `lowest`."""
    chunks, tail = divmod(row.shape[0], _CHUNK)

    def store(start: Any, size: int) -> None:
        values = _load(row, start, size)
        output[pl.ds(start, size)] = jnp.where(values >= lowest, values, -jnp.inf)

    @pl.loop(0, _trips(chunks, warpgroup))
    def _(i: Any) -> None:
        store(_chunk_start(i, warpgroup), _CHUNK)

    if tail:
        pl.when(warpgroup == chunks % _WARPGROUPS)(lambda: store(chunks * _CHUNK, tail))


def _trips(chunks: int, warpgroup: Any) -> Any:
    """How many of the row's whole chunks are this warpgroup's."""
    return (chunks - warpgroup + (_WARPGROUPS - 1)) // _WARPGROUPS


def _chunk_start(i: Any, warpgroup: Any) -> Any:
    return pl.multiple_of((i * _WARPGROUPS + warpgroup) * _CHUNK, _CHUNK)


def _share(
    smem: Any, barrier: Any, warpgroup: Any, number: Any, parts: tuple[jax.Array, ...], combine: Callable
) -> tuple[jax.Array, ...]:
    """Combines the warpgroups' scalars of pass `number`; all of them get the same result, combined in the same order."""
    half = (number & 1) * (_WARPGROUPS * _PIVOTS)
    for j, part in enumerate(parts):
        smem[half + warpgroup * _PIVOTS + j] = part
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
    totals = []
    for j in range(len(parts)):
        total = smem[half + j]
        for other in range(1, _WARPGROUPS):
            total = combine(total, smem[half + other * _PIVOTS + j])
        totals.append(total)
    return tuple(totals)
