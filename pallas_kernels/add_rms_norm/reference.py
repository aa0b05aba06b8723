"""The definition of the residual addition with RMS norm, in numpy."""

from __future__ import annotations

import numpy as np


def add_rms_norm(x: np.ndarray, delta: np.ndarray, weight: np.ndarray, *, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """(x + delta rounded to x's dtype, that divided by its root mean square and multiplied by weight), in float64."""
    total = (x.astype(np.float64) + delta.astype(np.float64)).astype(x.dtype)
    wide = total.astype(np.float64)
    normed = wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + eps) * weight.astype(np.float64)
    return total, normed.astype(x.dtype)
