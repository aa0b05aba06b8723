"""The definitions of the KV write and of rope with the write, in numpy: one token after the other."""

from __future__ import annotations

import numpy as np


def write_kv(
    k_cache: np.ndarray, v_cache: np.ndarray, k: np.ndarray, v: np.ndarray, slots: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """New caches with k[t], v[t] at slots[t] = block * block_size + offset; a negative slot skips the token."""
    k_cache, v_cache = k_cache.copy(), v_cache.copy()
    block_size = k_cache.shape[2]
    for token, slot in enumerate(slots):
        if slot >= 0:
            k_cache[slot // block_size, :, slot % block_size] = k[token]
            v_cache[slot // block_size, :, slot % block_size] = v[token]
    return k_cache, v_cache


def rope_write_kv(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    slots: np.ndarray,
    q_norm: np.ndarray | None = None,
    k_norm: np.ndarray | None = None,
    eps: float = 1e-6,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [T, H, D] and k [T, KVH, D], each head normalised if norms [D] are given, then rotated; in float64."""

    def turned(x: np.ndarray, norm: np.ndarray | None) -> np.ndarray:
        x = x.astype(np.float64)
        if norm is not None:
            x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * norm.astype(np.float64)
        first, second = np.split(x, 2, axis=-1)
        c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
        return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)

    dtype = k_cache.dtype
    k_cache, v_cache = write_kv(k_cache, v_cache, turned(k, k_norm).astype(dtype), v.astype(dtype), slots)
    return turned(q, q_norm).astype(q.dtype), k_cache, v_cache
