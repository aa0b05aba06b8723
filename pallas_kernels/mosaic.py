"""What the Mosaic GPU kernels share. Imported by them only, because it imports Pallas."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu


def interpret_params(interpret: bool) -> Any:
    """The `interpret` argument of plgpu.kernel: compiled, or run on the CPU with race detection."""
    return plgpu.InterpretGPUParams(detect_races=True) if interpret else None  # pyright: ignore


def load(ref: Any, layout: Any) -> jax.Array:
    """Loads into registers with this layout from any kind of memory, wherever in its array `ref` starts."""
    return plgpu.load(ref, layout=layout, optimized=False)  # pyright: ignore
