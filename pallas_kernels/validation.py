"""Argument checks shared by the ops: ValueErrors that say what was got and what is wanted."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

Array = jax.Array | np.ndarray
"""What the public functions take; numpy arrays are converted."""

BLOCK_SIZES = (16, 32, 64, 128)


def check_array(name: str, array: Array, shape: Sequence[int | None], dtype: DTypeLike | None = None) -> None:
    """ValueError unless `array` has this shape (None: any size) and dtype (None: any)."""
    wanted = "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"
    matches = array.ndim == len(shape) and all(w is None or g == w for g, w in zip(array.shape, shape, strict=True))
    if not matches:
        raise ValueError(f"{name} has shape {list(array.shape)}; wanted {wanted}")
    if dtype is not None and array.dtype != jnp.dtype(dtype):
        raise ValueError(f"{name} has dtype {array.dtype.name}; wanted {jnp.dtype(dtype).name}")


def check_caches(k_cache: Array, v_cache: Array) -> None:
    """ValueError unless both caches are `[num_blocks, num_kv_heads, block_size, head_dim]` and alike."""
    check_array("k_cache", k_cache, (None,) * 4)
    check_array("v_cache", v_cache, k_cache.shape, k_cache.dtype)
    check_block_size(k_cache.shape[2])


def check_block_size(block_size: int) -> None:
    """ValueError unless the block size is a supported one."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size is {block_size}; allowed: {', '.join(map(str, BLOCK_SIZES))}")
