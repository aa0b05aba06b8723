"""What has to be set in JAX before its backend starts, and what the engine asks of it afterwards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax

from vjax import envs
from vjax.log import logger

log = logger(__name__)

_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def backend_is_up() -> bool:
    """Whether JAX has already created its devices; settings of the memory pool come too late then."""
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def configure(gpu_memory_utilization: float) -> Any:
    """Sets the memory pool and the compile cache, and returns the device to run on.

    Args:
        gpu_memory_utilization: Fraction of the device's memory that XLA's pool may take.
    """
    if not backend_is_up():
        os.environ.setdefault(_FRACTION, str(gpu_memory_utilization))
    configure_compile_cache()
    device = jax.devices()[0]
    if device.platform == "gpu":
        _check_pool(device, gpu_memory_utilization)
    return device


def platform_name(device: Any) -> str:
    """ "gpu" or "cpu"."""
    return "gpu" if device.platform in ("gpu", "cuda") else "cpu"


def lowered_cache_dir() -> Path:
    """Folder of lowered programs, next to that of compiled ones. It need not exist."""
    return envs.cache_dir() / f"lowered-jax{jax.__version__}"


def configure_compile_cache() -> None:
    """Keeps compiled executables on disk, unless the application already configured JAX's cache or switched it off."""
    if not envs.compile_cache_enabled() or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = envs.cache_dir() / f"xla-jax{jax.__version__}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        log.warning("no compile cache: cannot create %s (%s); set VJAX_CACHE_DIR to a writable folder", folder, e)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _check_pool(device: Any, gpu_memory_utilization: float) -> None:
    fraction = os.environ.get(_FRACTION)
    if fraction is None:
        log.warning(
            "JAX was already running when the engine started, so gpu_memory_utilization=%s cannot change XLA's memory "
            "pool; create the LLM before other JAX work, or set %s",
            gpu_memory_utilization,
            _FRACTION,
        )
    elif abs(float(fraction) - gpu_memory_utilization) > 1e-6:
        log.warning(
            "XLA's memory pool was set to %s of %s (%s) before this engine asked for gpu_memory_utilization=%s; "
            "it keeps its size until the process ends",
            fraction,
            device.device_kind,
            _FRACTION,
            gpu_memory_utilization,
        )
