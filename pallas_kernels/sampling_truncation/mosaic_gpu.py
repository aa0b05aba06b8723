"""Sampling truncation for Hopper in Pallas Mosaic GPU: one CTA per row, which stays in the L2 while it is searched.

Every pass over the row evaluates three pivots and so takes two bits of the threshold; top-k and top-p each need at
most 16 passes. Rows that need no truncation are only copied.

A CTA has one warpgroup only: Mosaic GPU gives all warpgroups of a CTA the same scratch memory for reductions across
warps, so two of them must not reduce at the same time.
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
from jax.typing import DTypeLike

from pallas_kernels.mosaic import interpret_params, load

_THREADS = 128
_VECTOR = 4 * _THREADS  # values of one 16-byte load by every thread
_LOADS = 8  # loads in flight
_STEP = _LOADS * _VECTOR
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
        grid=(rows,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret_params(interpret),
        kernel_name="truncate_logits",
    )
    return kernel(padded, top_k, top_p, log_min_p)[:, :vocab]


def _kernel(vocab: int, logits: Any, top_k: Any, top_p: Any, log_min_p: Any, output: Any) -> None:
    """Body of one CTA."""
    index = lax.axis_index("row")
    row = logits.at[index]
    k, p, log_m = top_k[index], top_p[index], log_min_p[index]
    uses_k, uses_p = (k > 0) & (k < vocab), p < 1.0
    needed = uses_k | uses_p | (log_m > -jnp.inf)
    lowest = lax.cond(needed, lambda: _threshold(row, uses_k, k, uses_p, p, log_m), lambda: jnp.float32(-jnp.inf))
    _store_kept(row, output.at[index], lowest)


def _threshold(row: Any, uses_k: Any, k: Any, uses_p: Any, p: Any, log_min_p: Any) -> jax.Array:
    """The smallest logit of the row that is kept."""
    (maximum,) = _reduce(row, lambda x: (x,), jnp.maximum, -jnp.inf, 1)
    low, high = _ordered(maximum + log_min_p), _ordered(maximum)

    def sums(weight: Callable, pivots: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """For each pivot the sum of weight(x) over the x of the row that are not below it."""
        values = tuple(_value(pivot) for pivot in pivots)

        def parts(x: jax.Array) -> tuple[jax.Array, ...]:
            weights = weight(x)
            return tuple(jnp.where(x >= value, weights, 0.0) for value in values)

        return _reduce(row, parts, jnp.add, 0.0, len(values))

    count = functools.partial(sums, jnp.ones_like)
    low = lax.cond(uses_k, lambda: _search(count, k.astype(jnp.float32), low, high), lambda: low)

    def search_p() -> jax.Array:
        mass = functools.partial(sums, lambda x: jnp.exp2((x - maximum) * _LOG2E))
        (total,) = mass((low,))
        return _search(mass, p * total, low, high)

    return _value(lax.cond(uses_p, search_p, lambda: low))


def _search(sums: Callable, target: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """The largest ordered value in [low, high] from which on the row sums to the target.

    The sum from `low` on is taken to reach the target. A pivot that meets the target exactly ends the search: no
    other one keeps fewer values.
    """

    def narrow(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = state
        middle = _middle(low, high)
        pivots = (_middle(low, middle - 1), middle, _middle(middle, high))
        for pivot, total in zip(pivots, sums(pivots), strict=True):
            low = jnp.where(total >= target, jnp.maximum(low, pivot), low)
            high = jnp.where(total > target, high, jnp.minimum(high, jnp.where(total == target, pivot, pivot - 1)))
        return low, high

    return lax.while_loop(lambda state: state[0] < state[1], narrow, (low, high))[0]


def _reduce(row: Any, parts: Callable, combine: Callable, identity: float, results: int) -> tuple[jax.Array, ...]:
    """Scalars: `parts` (an array of values to `results` arrays) of the whole row, combined."""
    to_scalar = jnp.max if combine is jnp.maximum else jnp.sum
    steps, tail = divmod(row.shape[0], _STEP)

    def step(i: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        start = pl.multiple_of(i * _STEP, _STEP)
        for values in [_load(row, start + j * _VECTOR, _VECTOR) for j in range(_LOADS)]:
            carry = tuple(combine(old, new) for old, new in zip(carry, parts(values), strict=True))
        return carry

    empty = plgpu.layout_cast(jnp.full((_VECTOR,), identity, jnp.float32), _layout(_VECTOR))
    scalars = tuple(map(to_scalar, lax.fori_loop(0, steps, step, (empty,) * results)))
    if tail:
        extra = map(to_scalar, parts(_load(row, steps * _STEP, tail)))
        scalars = tuple(combine(old, new) for old, new in zip(scalars, extra, strict=True))
    return scalars


def _store_kept(row: Any, output: Any, lowest: jax.Array) -> None:
    """Writes the row with -inf for what lies below `lowest`."""
    steps, tail = divmod(row.shape[0], _STEP)

    def store(start: Any, values: jax.Array) -> None:
        output[pl.ds(start, values.shape[0])] = jnp.where(values >= lowest, values, -jnp.inf)

    @pl.loop(0, steps)
    def _(i: Any) -> None:
        starts = [pl.multiple_of(i * _STEP, _STEP) + j * _VECTOR for j in range(_LOADS)]
        for start, values in zip(starts, [_load(row, start, _VECTOR) for start in starts], strict=True):
            store(start, values)

    if tail:
        store(steps * _STEP, _load(row, steps * _STEP, tail))


def _middle(low: jax.Array, high: jax.Array) -> jax.Array:
    """The mean, rounded up, without overflow."""
    return (low | high) - ((low ^ high) >> 1)


def _ordered(value: jax.Array) -> jax.Array:
    """int32 that compares like the float32."""
    bits = _bitcast(value, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _value(ordered: jax.Array) -> jax.Array:
    """The float32 of an ordered int32."""
    return _bitcast(jnp.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered), jnp.float32)


def _bitcast(scalar: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Bitcast of a scalar by way of a vector: Mosaic GPU lowers it for vectors only."""
    vector = plgpu.layout_cast(jnp.full((_THREADS,), scalar), _layout(_THREADS))
    return lax.bitcast_convert_type(vector, dtype).max()


def _layout(size: int) -> Any:
    return plgpu.Layout.WG_STRIDED((size,), vec_size=math.gcd(size // _THREADS, 4))


def _load(row: Any, start: Any, size: int) -> jax.Array:
    return load(row.at[pl.ds(start, size)], _layout(size))
