"""Scales of an fp8 KV cache that a checkpoint may have, under the names that vLLM reads. No jax."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vjax.errors import ModelLoadError
from vjax.models.arch import ArchConfig
from vjax.weights.checkpoint import Checkpoint
from vjax.weights.manifest import Manifest, stored_format
from vjax.weights.mapping import KV_SCALE


def read_kv_scales(model_dir: Path, arch: ArchConfig, load_format: str = "auto") -> dict[str, np.ndarray] | None:
    """k_scale and v_scale, f32[layers, kv_heads], of an fp8 KV cache; None when the checkpoint has none, or is "dummy".

    A scale of a tensor counts for all heads, a layer without one has 1. They are rounded up to powers of two: e4m3 has
    the same relative precision at every scale, and multiplying by a power of two is exact.

    Raises:
        ModelLoadError: There is no checkpoint, or a scale is no positive number or has another shape than [] or
            [kv_heads].
    """
    stored = stored_format(model_dir, load_format)
    if stored == "dummy":
        return None
    if stored == "orbax":
        scales = Manifest.read(model_dir).kv_scales
        return {name: _of_manifest(name, scales[name], arch) for name in ("k_scale", "v_scale")} if scales else None
    with Checkpoint(model_dir) as checkpoint:
        found = {name: match for name in checkpoint.tensors if (match := KV_SCALE.match(name))}
        values = {name: _checked(name, checkpoint.read(name), arch.num_kv_heads) for name in found}
    if not found:
        return None
    scales = {which: np.ones((arch.num_layers, arch.num_kv_heads), np.float32) for which in "kv"}
    for both_first in (True, False):  # a scale of its own goes before one for both
        for name, match in found.items():
            if bool(match["both"]) == both_first:
                _fill(scales, match, values[name], name)
    return {"k_scale": scales["k"], "v_scale": scales["v"]}


def kv_scale_tensors(scales: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors, f32[kv_heads] by name, that `read_kv_scales` reads as these scales."""
    return {
        f"model.layers.{layer}.self_attn.attn.{which}": np.ascontiguousarray(row, np.float32)
        for which, rows in scales.items()
        for layer, row in enumerate(rows)
    }


def _of_manifest(name: str, rows: list[list[float]], arch: ArchConfig) -> np.ndarray:
    values = np.asarray(rows, np.float32)
    if values.shape != (arch.num_layers, arch.num_kv_heads):
        raise ModelLoadError(f"{name} has shape {list(values.shape)}; wanted {[arch.num_layers, arch.num_kv_heads]}")
    return values


def _fill(scales: Mapping[str, np.ndarray], match: re.Match[str], value: np.ndarray, name: str) -> None:
    layer = int(match["layer"])
    if layer >= len(scales["k"]):
        raise ModelLoadError(f"{name} belongs to a layer that the model, with {len(scales['k'])} layers, does not have")
    for which in "kv" if match["both"] else match["which"] or match["proj"]:
        scales[which][layer] = value


def _checked(name: str, value: np.ndarray, num_kv_heads: int) -> np.ndarray:
    scale = np.asarray(value, np.float32)
    if scale.size not in (1, num_kv_heads):
        raise ModelLoadError(f"{name} has shape {list(scale.shape)}; wanted [] or [{num_kv_heads}]")
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ModelLoadError(f"{name} is {scale.ravel().tolist()}; a scale must be a positive number")
    return round_up_to_power_of_two(scale.reshape(-1))


def round_up_to_power_of_two(x: np.ndarray) -> np.ndarray:
    """The least powers of two, f32, that are not below the positive numbers x."""
    fraction, exponent = np.frexp(np.asarray(x, np.float32))
    return np.ldexp(np.float32(1), np.where(fraction == 0.5, exponent - 1, exponent)).astype(np.float32)
