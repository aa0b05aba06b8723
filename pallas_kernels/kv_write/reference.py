"""The definition of the KV write, in numpy: one token after the other."""

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
