"""What the Mosaic GPU kernels share. Imported by them only, because it imports Pallas."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import lax
from jax._src.lib import mosaic_gpu as _lib
from jax.experimental.pallas import mosaic_gpu as plgpu


def _ask_ptxas_once() -> None:
    """JAX 0.11.2 asks ptxas for its version at each conversion of a bool, 5 ms every time, holding the interpreter."""
    extension: Any = getattr(_lib, "_mosaic_gpu_ext", None)
    ask = getattr(extension, "_get_ptxas_isa_version", None)
    if ask is not None and not hasattr(ask, "cache_info"):
        extension._get_ptxas_isa_version = functools.cache(ask)


_ask_ptxas_once()


def interpret_params(interpret: bool) -> Any:
    """The `interpret` argument of plgpu.kernel: compiled, or run on the CPU with race detection."""
    return plgpu.InterpretGPUParams(detect_races=True) if interpret else None  # pyright: ignore


def load(ref: Any, layout: Any) -> jax.Array:
    """Loads into registers with this layout from any kind of memory, wherever in its array `ref` starts."""
    return plgpu.load(ref, layout=layout, optimized=False)  # pyright: ignore


def over_columns(column: jax.Array, shape: tuple[int, ...], layout: Any = None) -> jax.Array:
    """[rows, columns] of [rows], in `layout` (None: that of a wgmma)."""
    layout = layout or plgpu.Layout.WGMMA
    return plgpu.layout_cast(lax.broadcast_in_dim(column, shape, [0]), layout)


def divide_registers(compute: int, count: int, other: int) -> tuple[int, int]:
    """(compute, other): registers a thread of `count` warpgroups and of one more, for set_max_registers.

    A CTA has what its threads were launched with, the same for all and a multiple of 8. A warpgroup that asks for more
    than the others leave waits for ever.
    """
    launched = 65536 // (128 * (count + 1)) // 8 * 8
    assert compute * count + other <= launched * (count + 1), (compute, count, other)
    return compute, other
