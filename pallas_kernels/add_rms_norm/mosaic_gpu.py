"""Residual addition and RMS norm for Hopper in Pallas Mosaic GPU: a CTA holds its tokens in registers.

A token is cut into one piece for each warp. All loads are issued at once; the squares of a warp meet by shuffles, those
of the warps in shared memory. Between, the sum stays in registers. For decode the launch and one trip to memory are all
it costs; for prefill it is bound by memory, `8 * N` bytes a token of a 16-bit type.
"""

from __future__ import annotations

import dataclasses
import functools
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
_MAX_WARPGROUPS = 4
_MAX_ELEMENTS = 32
"""Of a token in one thread's registers: x, delta and the weights, and float32 of some."""
_FEW_TOKENS = 1024
"""Up to here the time of one CTA counts, above it how much the CTAs of an SM load together."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning parameters."""

    warpgroups: int = 1
    """Of a CTA, all on the same tokens; 128 times as many must divide N."""
    tokens: int = 1
    """Of a CTA, loaded together."""


def supports(num_tokens: int, size: int) -> bool:
    """Whether the kernel takes [num_tokens, size]: a size that fills the threads and fits into their registers."""
    return num_tokens > 0 and size % _THREADS == 0 and size <= _MAX_ELEMENTS * _THREADS * _most_warpgroups(size)


def default_config(num_tokens: int, size: int) -> Config:
    """Without tuning data: for few tokens one 16-byte load of each array in a thread, for many four."""
    per_thread = 8 if num_tokens <= _FEW_TOKENS else _MAX_ELEMENTS
    warpgroups = 1
    while 2 * warpgroups <= _most_warpgroups(size) and size // (_THREADS * warpgroups) > per_thread:
        warpgroups *= 2
    return Config(warpgroups)


def _most_warpgroups(size: int) -> int:
    """The largest power of two of warpgroups among which `size` can be cut."""
    warpgroups = _MAX_WARPGROUPS
    while size % (_THREADS * warpgroups) and warpgroups > 1:
        warpgroups //= 2
    return warpgroups


def candidates(size: int) -> list[Config]:
    """What is worth timing for this size."""
    configs = [Config(*fields) for fields in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2), (4, 4))]
    return [
        config
        for config in configs
        if size % (_THREADS * config.warpgroups) == 0
        and size * config.tokens <= 2 * _MAX_ELEMENTS * _THREADS * config.warpgroups
        and size <= _MAX_ELEMENTS * _THREADS * config.warpgroups
    ]


def add_rms_norm(
    x: jax.Array,
    delta: jax.Array,
    weight: jax.Array,
    *,
    eps: float,
    interpret: bool,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See api.add_rms_norm; `interpret` runs the kernel on the CPU with race detection."""
    num_tokens, size = x.shape
    if config is None:
        exact = {"size": size, "dtype": x.dtype.name}
        fallback = functools.partial(default_config, num_tokens, size)
        config = lookup("add_rms_norm", Config, exact, {"num_tokens": num_tokens}, fallback)
    warps = _WARPS * config.warpgroups
    pieces = (warps, size // warps)
    piece = _Piece(size // warps, max(x.dtype.itemsize, weight.dtype.itemsize))
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
    total, normed = kernel(x.reshape(out.shape), delta.reshape(out.shape), weight.reshape(pieces))
    return total.reshape(x.shape), normed.reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What a warp holds of a token: `width` elements, a multiple of 32, of at most `itemsize` bytes."""

    width: int
    itemsize: int

    @property
    def layout(self) -> Any:
        """Of [4, width] in a warpgroup: a row for each warp, neighbours in the widest vectors that fit."""
        vector = _VECTOR_BYTES // self.itemsize
        while self.width % (_LANES * vector):
            vector //= 2
        row = _LANES * vector
        # Tiled dims of one tile: [warps, 1, 1, lanes, 1, vector].
        layout = TiledLayout(
            plgpu.Tiling(((_WARPS, row), (1, row), (1, vector))),
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
    scale = load(weight.at[rows], layout)
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
        parts = [partials[j, warp] for warp in range(warps)]
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
        factor = lax.rsqrt(parts[0] * (1 / (warps * width)) + eps)
        normed = total.astype(jnp.float32) * factor * scale.astype(jnp.float32)
        store(normed_out, j, normed.astype(normed_out.dtype))
