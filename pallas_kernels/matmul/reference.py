"""The definitions of the products, in numpy."""

from __future__ import annotations

import numpy as np


def matmul(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x [M, K] @ w [K, N], summed in float64 and rounded to the dtype of x."""
    return (x.astype(np.float64) @ w.astype(np.float64)).astype(x.dtype)


def gated_matmul(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """silu(x @ w[:, 0]) * (x @ w[:, 1]) of x [M, K] and w [K, 2, N], in float64, rounded to the dtype of x."""
    gate, up = (x.astype(np.float64) @ w[:, half].astype(np.float64) for half in range(2))
    return (gate / (1 + np.exp(-gate)) * up).astype(x.dtype)
