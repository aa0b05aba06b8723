"""The definition of sampling truncation, in numpy and float64, with a sort."""

from __future__ import annotations

import numpy as np


def truncate_logits(logits: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, min_p: np.ndarray) -> np.ndarray:
    """f32[R, V] with -inf outside the kept set: min_p, then top_k, then top_p, ties with the threshold kept."""
    rows = [_truncate(*row) for row in zip(logits, top_k, top_p, min_p, strict=True)]
    return np.stack(rows)


def _truncate(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    values = logits.astype(np.float64)
    mass = np.exp(values - values.max())
    keep = np.isfinite(values)
    if min_p > 0:
        keep &= mass >= min_p
    if 0 < top_k < keep.sum():
        keep &= values >= np.sort(values[keep])[-top_k]
    if top_p < 1:
        kept = np.sort(values[keep])[::-1]
        cumulative = np.cumsum(np.exp(kept - kept[0]))
        last = np.searchsorted(cumulative, top_p * cumulative[-1])
        keep &= values >= kept[min(last, len(kept) - 1)]
    return np.where(keep, logits, -np.inf).astype(np.float32)
