"""The one place that reads environment variables. Read at each call, so that a change takes effect without a reload.

| variable | meaning | default |
|---|---|---|
| VJAX_USE_V1 | 1: V1 engine, 0: V0 engine; an explicit `use_v1` wins | VLLM_USE_V1, then 1 |
| VJAX_ENABLE_V1_MULTIPROCESSING | 1: the engine core in a process of its own, 0: in this one | see below |
| VJAX_CACHE_DIR | folder for lowered and compiled programs | ~/.cache/vjax |
| VJAX_COMPILE_CACHE | 0: do not keep lowered and compiled programs between processes | 1 |
| VJAX_PROFILER_DIR | folder of the traces that `start_profile` begins; the argument profiler_dir wins | none |
| VJAX_LOG_LEVEL | DEBUG, INFO, WARNING or ERROR | INFO |
| VJAX_LOG_FORMAT | text, or json: every log record is one JSON object on a line of its own | text |

Where VJAX_ENABLE_V1_MULTIPROCESSING is not set, VLLM_ENABLE_V1_MULTIPROCESSING counts; without either, an `AsyncLLM`
has a process for its core and an `LLM` has not.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from vjax.errors import ConfigError

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
LOG_FORMATS = ("text", "json")

_RELEVANT = ("VJAX_", "VLLM_", "JAX_", "XLA_", "CUDA_", "HF_", "LD_LIBRARY_PATH", "TOKENIZERS_")
_SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD")

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


def use_v1() -> bool:
    """Raises: ConfigError if the variable is set to something other than 0 or 1."""
    for name in ("VJAX_USE_V1", "VLLM_USE_V1"):
        if os.environ.get(name, "").strip():
            return _switch(name, default=True)
    return True


def enable_multiprocessing(default: bool) -> bool:
    """Whether an engine core gets a process of its own. Raises: ConfigError if a variable is set to something other
    than 0 or 1."""
    for name in ("VJAX_ENABLE_V1_MULTIPROCESSING", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        if os.environ.get(name, "").strip():
            return _switch(name, default)
    return default


def cache_dir() -> Path:
    """Folder for what outlives the process. It need not exist."""
    folder = os.environ.get("VJAX_CACHE_DIR", "").strip()
    return Path(folder or "~/.cache/vjax").expanduser()


def profiler_dir() -> str | None:
    """Folder for traces; None: there are none."""
    return os.environ.get("VJAX_PROFILER_DIR", "").strip() or None


def compile_cache_enabled() -> bool:
    """Raises: ConfigError if the variable is set to something other than 0 or 1."""
    return _switch("VJAX_COMPILE_CACHE", default=True)


def with_compile_cache(folder: str) -> dict[str, str]:
    """This process's environment for a child that keeps its compiled executables in `folder`, and nowhere else."""
    others = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    kept = {name: value for name, value in os.environ.items() if name not in others}
    return kept | {"VJAX_CACHE_DIR": folder, "VJAX_COMPILE_CACHE": "1"}


def with_imports() -> dict[str, str]:
    """This process's environment for a child that imports what this process imports."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(folder) for folder in sys.path)}


def without_device() -> dict[str, str]:
    """This process's environment for a child that uses JAX on the CPU only, and imports what this process imports."""
    kept = {name: value for name, value in with_imports().items() if name != "XLA_FLAGS"}
    return kept | {
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        # JAX looks for its GPU plugin even then, and would complain that there is no GPU.
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }


def relevant() -> dict[str, str]:
    """The variables of this process that bear on vjax, JAX or the hub, for a report: secrets are not shown."""

    def shown(name: str, value: str) -> str:
        is_secret = any(part in _SECRETS for part in name.split("_"))
        return "set, not shown" if is_secret else value

    return {name: shown(name, value) for name, value in sorted(os.environ.items()) if name.startswith(_RELEVANT)}


def log_level() -> str:
    """One of LOG_LEVELS. Raises: ConfigError for another name."""
    return _choice("VJAX_LOG_LEVEL", os.environ.get("VJAX_LOG_LEVEL", "").strip().upper() or "INFO", LOG_LEVELS)


def log_format() -> str:
    """One of LOG_FORMATS. Raises: ConfigError for another name."""
    return _choice("VJAX_LOG_FORMAT", os.environ.get("VJAX_LOG_FORMAT", "").strip().lower() or "text", LOG_FORMATS)


def _choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ConfigError(
            f"{name}={value!r} must be one of {', '.join(choices)}; set one of these or unset it.",
            parameter=name,
            value=value,
        )
    return value


def _switch(name: str, default: bool) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if not value:
        return default
    if value not in _TRUE + _FALSE:
        raise ConfigError(
            f"{name}={value!r} must be 0 or 1; set one of these or unset it.", parameter=name, value=value
        )
    return value in _TRUE
