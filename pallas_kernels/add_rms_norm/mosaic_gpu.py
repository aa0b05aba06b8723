"""Residual addition and RMS norm for Hopper in Pallas Mosaic GPU: a CTA holds its tokens in registers.

A token is cut into one piece for each warp. All loads are issued at once; the squares of a warp meet by shuffles, those
of the warps in shared memory. Between, the sum stays in registers. For decode the launch and one trip to memory are all
it costs; for prefill it is bound by memory, `8 * N` bytes a token of a 16-bit type.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import TiledLayout
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import interpret_params, load
from pallas_kernels.tuning import lookup

_LANES = 32
_WARPS = 4
_THREADS = _LANES * _WARPS
_VECTOR_BYTES = 16
_MAX_WARPGROUPS = 8
_FEW_TOKENS = 1024
"""Up to here the time of one CTA counts, above it how much the CTAs of an SM load together."""
_MANY_ELEMENTS = 40
"""Of a thread with many tokens: with more, too few CTAs share an SM."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning parameters."""

    warpgroups: int = 1
    """Of a CTA, all on the same tokens; 128 times as many must divide N."""
    tokens: int = 1
    """Of a CTA, loaded together."""


def itemsize_of(x: jax.Array, weight: jax.Array) -> int:
    """The larger one of the two arrays."""
    return max(x.dtype.itemsize, weight.dtype.itemsize)


def configs(size: int, itemsize: int = 2) -> list[Config]:
    """All that cut tokens of `size` elements evenly and hold them in registers; empty for sizes left to XLA."""
    found = []
    for warpgroups, tokens in itertools.product(range(1, _MAX_WARPGROUPS + 1), (1, 2, 4)):
        elements = tokens * size // (_THREADS * warpgroups)
        # By ptxas: 20, one for each element in float32, and those of x, delta and weight as they were loaded.
        registers = 24 + elements + elements * itemsize // 2
        if size % (_THREADS * warpgroups) == 0 and registers <= min(168, 512 // warpgroups):
            found.append(Config(warpgroups, tokens))
    return found


def supports(size: int, itemsize: int) -> bool:
    """Whether the kernel takes tokens of this size."""
    return bool(configs(size, itemsize))


def default_config(num_tokens: int, size: int, itemsize: int = 2) -> Config:
    """Without tuning data: for few tokens the fewest loads in a thread, for many the widest ones and small CTAs."""
    single = [config for config in configs(size, itemsize) if config.tokens == 1]
    pieces = [(config, _Piece(size // (_WARPS * config.warpgroups), itemsize)) for config in single]
    if num_tokens <= _FEW_TOKENS:
        return min(pieces, key=lambda pair: (pair[1].loads, pair[0].warpgroups))[0]
    small = [pair for pair in pieces if pair[1].width <= _MANY_ELEMENTS * _LANES]
    return min(small or pieces[-1:], key=lambda pair: (-pair[1].vector, pair[0].warpgroups))[0]


def add_rms_norm(
    x: jax.Array,
    delta: jax.Array,
    weight: jax.Array,
    layer: jax.Array | None = None,
    *,
    eps: float,
    interpret: bool,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See api.add_rms_norm; `interpret` runs the kernel on the CPU with race detection."""
    num_tokens, size = x.shape
    itemsize = itemsize_of(x, weight)
    if config is None:
        exact = {"size": size, "itemsize": itemsize}
        fallback = functools.partial(default_config, num_tokens, size, itemsize)
        config = lookup("add_rms_norm", Config, exact, {"num_tokens": num_tokens}, fallback)
    warps = _WARPS * config.warpgroups
    pieces = (warps, size // warps)
    piece = _Piece(size // warps, itemsize)
    out = jax.ShapeDtypeStruct((num_tokens, *pieces), x.dtype)
    kernel = plgpu.kernel(
        functools.partial(_kernel, config, piece, eps),
        out_type=(out, out),
        scratch_types={
            "partials": plgpu.SMEM((config.tokens, warps), jnp.float32),
            "written": plgpu.Barrier(num_arrivals=config.warpgroups),
        },
        grid=(pl.cdiv(num_tokens, config.tokens),),
        grid_names=("cta",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            # Shared memory is written once, before the barrier, and read after it.
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret_params(interpret),
        kernel_name="add_rms_norm",
    )
    row = jnp.zeros(1, jnp.int32) if layer is None else layer.reshape(1)
    total, normed = kernel(x.reshape(out.shape), delta.reshape(out.shape), weight.reshape(-1, *pieces), row)
    return total.reshape(x.shape), normed.reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What a warp holds of a token: `width` elements, a multiple of 32, of at most `itemsize` bytes."""

    width: int
    itemsize: int

    @property
    def vector(self) -> int:
        """Neighbours that a thread loads at once: as many as fit."""
        vector = _VECTOR_BYTES // self.itemsize
        while self.width % (_LANES * vector):
            vector //= 2
        return vector

    @property
    def loads(self) -> int:
        """Of each array, in a thread."""
        return self.width // (_LANES * self.vector)

    @property
    def layout(self) -> Any:
        """Of [4, width] in a warpgroup: a row for each warp."""
        row = _LANES * self.vector
        # Tiled dims of one tile: [warps, 1, 1, lanes, 1, vector].
        layout = TiledLayout(
            plgpu.Tiling(((_WARPS, row), (1, row), (1, self.vector))),
            warp_dims=(-6,),
            lane_dims=(-3,),
            vector_dim=-1,
            _check_canonical=False,
        ).canonicalize()
        return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def _kernel(
    config: Config,
    piece: _Piece,
    eps: float,
    x: Any,
    delta: Any,
    weight: Any,
    row: Any,
    total_out: Any,
    normed_out: Any,
    partials: Any,
    written: Any,
) -> None:
    """Body of one warpgroup: its rows of [tokens, warps, width]."""
    num_tokens, warps, width = x.shape
    first = lax.axis_index("cta") * config.tokens
    rows = pl.ds(lax.axis_index("warpgroup") * _WARPS, _WARPS)
    layout = piece.layout
    tokens = [lax.min(first + j, num_tokens - 1) for j in range(config.tokens)]
    loaded = [(load(x.at[token, rows], layout), load(delta.at[token, rows], layout)) for token in tokens]
    scale = load(weight.at[row[0], rows], layout)
    totals = [a + b for a, b in loaded]
    for j, total in enumerate(totals):
        wide = total.astype(jnp.float32)
        partials[j, rows] = jnp.sum(wide * wide, axis=1)
    plgpu.barrier_arrive(written)

    def store(out: Any, j: int, value: jax.Array) -> None:
        @pl.when(first + j < num_tokens)
        def _() -> None:
            out[first + j, rows] = value

    for j, total in enumerate(totals):
        store(total_out, j, total)
    plgpu.barrier_wait(written)
    for j, total in enumerate(totals):
        squares = _sum([partials[j, warp] for warp in range(warps)])
        factor = lax.rsqrt(squares * (1 / (warps * width)) + eps)
        normed = total.astype(jnp.float32) * factor * scale.astype(jnp.float32)
        store(normed_out, j, normed.astype(normed_out.dtype))


def _sum(values: list[jax.Array]) -> jax.Array:
    """By halves, so that few additions wait for each other."""
    if len(values) == 1:
        return values[0]
    middle = len(values) // 2
    return _sum(values[:middle]) + _sum(values[middle:])
