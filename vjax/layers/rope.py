"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864) and its context extensions.

Frequencies are numpy constants of the model; cos and sin are computed once per step and shared by all layers. The
rotation itself is part of the KV write (`pallas_kernels.rope_write_kv`).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from vjax.models.arch import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies f32 `[head_dim / 2]`, and the factor that multiplies cos and sin.

    Computed in float32, step by step as transformers does: at large positions a last-bit difference would move angles.
    "dynamic" uses the unscaled frequencies, which hold up to max_position_embeddings.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inv_freq = np.float32(1.0) / np.float32(rope.theta) ** exponents
    if rope.rope_type == "linear":
        return inv_freq / np.float32(rope.factor), 1.0
    if rope.rope_type == "llama3":
        return _llama3(inv_freq, rope), 1.0
    if rope.rope_type == "yarn":
        return _yarn(inv_freq, rope, head_dim), _yarn_attention_factor(rope)
    assert rope.rope_type in ("default", "dynamic"), rope.rope_type
    return inv_freq, 1.0


def _llama3(inv_freq: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between are blended."""
    context = rope.original_max_position_embeddings
    assert context is not None
    wavelength = np.float32(2 * math.pi) / inv_freq
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = (np.float32(context) / wavelength - np.float32(low)) / np.float32(high - low)
    stretched = inv_freq / np.float32(rope.factor)
    blended = (np.float32(1) - smooth) * stretched + smooth * inv_freq
    result = np.where(wavelength > context / low, stretched, inv_freq)
    between = (wavelength >= context / high) & (wavelength <= context / low)
    return np.where(between, blended, result).astype(np.float32)


def _yarn(inv_freq: np.ndarray, rope: RopeConfig, head_dim: int) -> np.ndarray:
    """YaRN, "NTK by parts" (Peng et al., 2023, arXiv:2309.00071): a linear ramp over dimensions between frequencies
    that turn more than beta_fast times in the original context (kept) and fewer than beta_slow times (stretched)."""
    context = rope.original_max_position_embeddings
    assert context is not None

    def dimension_of(rotations: float) -> float:
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    return (inv_freq / np.float32(rope.factor) * ramp + inv_freq * (np.float32(1) - ramp)).astype(np.float32)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(multiplier: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * multiplier * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def rope_cos_sin(positions: jax.Array, rope: RopeConfig, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each f32 `[T, head_dim / 2]`, of positions i32 `[T]`."""
    inv_freq, attention_factor = inverse_frequencies(rope, head_dim)
    angles = positions.astype(jnp.float32)[:, None] * inv_freq[None, :]
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor
