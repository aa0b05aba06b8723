"""Which implementation of an op runs: names, the default for the device, and what each one can do."""

from __future__ import annotations

import functools
import importlib
import logging

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

logger = logging.getLogger(__name__)

XLA = "xla"
MOSAIC_GPU = "mosaic_gpu"
MOSAIC_GPU_INTERPRET = "mosaic_gpu_interpret"
"""The Mosaic GPU kernels run on the CPU by Pallas' interpreter with race detection: for tests."""

IMPLEMENTATIONS = (XLA, MOSAIC_GPU, MOSAIC_GPU_INTERPRET)

_MOSAIC_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16), jnp.dtype(jnp.float8_e4m3fn))
_MOSAIC_HEAD_DIMS = (64, 128, 256)
_MOSAIC_MIN_JAX = (0, 11)


def mosaic_unavailable_reason() -> str | None:
    """Why the Mosaic GPU kernels cannot be used with this JAX at all, or None."""
    if jax.__version_info__[:2] < _MOSAIC_MIN_JAX:
        wanted = ".".join(map(str, _MOSAIC_MIN_JAX))
        return f"the Mosaic GPU kernels need jax >= {wanted}, this is {jax.__version__}"
    return None


def is_mosaic(implementation: str) -> bool:
    """Whether the name means the Mosaic GPU kernels, on the GPU or interpreted."""
    return implementation in (MOSAIC_GPU, MOSAIC_GPU_INTERPRET)


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def _hopper_or_reason() -> tuple[bool, str | None]:
    """Returns (the default device is a Hopper GPU, why a GPU gets no Mosaic kernels or None)."""
    if jax.default_backend() != "gpu":
        return False, None
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability != "9.0":
        return False, f"{device.device_kind} has compute capability {capability}, the kernels are for 9.0 (Hopper)"
    reason = mosaic_unavailable_reason()
    return reason is None, reason


def default_implementation(dtype: DTypeLike, head_dim: int) -> str:
    """The attention and KV-write implementation for the default device.

    "mosaic_gpu" on a Hopper GPU with bfloat16, float16 or float8_e4m3fn and a head dim of at most 256, else "xla"; when
    that happens on a GPU one warning is logged, because it is slow.

    Args:
        dtype: Dtype of the KV cache.
        head_dim: Head dim of the model (before padding).
    """
    hopper, reason = _hopper_or_reason()
    if hopper and jnp.dtype(dtype) not in _MOSAIC_DTYPES:
        reason = f"the kernels take bfloat16, float16 or float8_e4m3fn, not {jnp.dtype(dtype).name}"
    elif hopper and head_dim > _MOSAIC_HEAD_DIMS[-1]:
        reason = f"the kernels take head dims up to {_MOSAIC_HEAD_DIMS[-1]}, not {head_dim}"
    elif hopper:
        return MOSAIC_GPU
    if reason is not None:
        _warn_once(f"attention runs in plain XLA, which is slow: {reason}")
    return XLA


def default_truncation_implementation() -> str:
    """The sampling truncation implementation for the default device (its logits are always float32)."""
    return _default_of_any_dtype("sampling truncation")


def default_norm_implementation() -> str:
    """The implementation of residual addition with RMS norm for the default device."""
    return _default_of_any_dtype("RMS norm")


def _default_of_any_dtype(what: str) -> str:
    hopper, reason = _hopper_or_reason()
    if hopper:
        return MOSAIC_GPU
    if reason is not None:
        _warn_once(f"{what} runs in plain XLA, which is slow: {reason}")
    return XLA


def load_runtime(implementation: str) -> None:
    """Makes this process able to compile programs that another one lowered: importing Mosaic GPU, as lowering does, is
    what tells XLA where the library is that its kernels are launched by."""
    if is_mosaic(checked_implementation(implementation)):
        importlib.import_module("pallas_kernels.mosaic")


def checked_implementation(implementation: str) -> str:
    """Returns the name; ValueError for an unknown one, NotImplementedError for one that this JAX cannot run."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; allowed: {', '.join(IMPLEMENTATIONS)}")
    if is_mosaic(implementation):
        reason = mosaic_unavailable_reason()
        if reason is not None:
            raise NotImplementedError(f"{reason}; use implementation='xla'")
    return implementation


def check_mosaic_cache(dtype: DTypeLike, head_dim: int) -> None:
    """NotImplementedError unless the Mosaic GPU kernels can work on a cache of this dtype and head dim."""
    if jnp.dtype(dtype) not in _MOSAIC_DTYPES:
        raise NotImplementedError(
            f"KV cache dtype is {jnp.dtype(dtype).name}; mosaic_gpu takes bfloat16, float16 or "
            "float8_e4m3fn: use implementation='xla'"
        )
    if head_dim not in _MOSAIC_HEAD_DIMS:
        raise NotImplementedError(
            f"head_dim is {head_dim}; mosaic_gpu takes {_MOSAIC_HEAD_DIMS}: zero-pad q, k and v to "
            f"padded_head_dim({head_dim}, 'mosaic_gpu'), or use implementation='xla'"
        )


def padded_head_dim(head_dim: int, implementation: str) -> int:
    """The head dim that the KV cache, q, k and v need for this implementation (zero-padded at the end).

    Zero padding changes neither scores nor the leading head_dim columns of the output; the scale stays that of the
    model's own head dim. Raises NotImplementedError when the implementation has no such head dim.
    """
    if head_dim <= 0:
        raise ValueError(f"head_dim is {head_dim}; it must be positive")
    if not is_mosaic(checked_implementation(implementation)):
        return head_dim
    for padded in _MOSAIC_HEAD_DIMS:
        if head_dim <= padded:
            return padded
    raise NotImplementedError(
        f"head_dim is {head_dim}; {implementation} takes at most {_MOSAIC_HEAD_DIMS[-1]}, use implementation='xla'"
    )
