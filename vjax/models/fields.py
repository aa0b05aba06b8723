"""Checked access to numbers in config.json. No jax."""

from __future__ import annotations

from typing import Any

from vjax.errors import ModelLoadError


def positive_int(config: dict[str, Any], key: str, default: int | None = None) -> int:
    """config[key], or the default where the key is missing or null.

    Raises:
        ModelLoadError: It is missing without a default, or no positive integer.
    """
    value = _get(config, key, default, "integer")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _wrong(key, value, "integer")
    return value


def positive_number(config: dict[str, Any], key: str, default: float | None = None) -> float:
    """config[key] as a float, or the default where the key is missing or null.

    Raises:
        ModelLoadError: It is missing without a default, or no positive number.
    """
    value = _get(config, key, default, "number")
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise _wrong(key, value, "number")
    return float(value)


def _get(config: dict[str, Any], key: str, default: Any, kind: str) -> Any:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelLoadError(f"config.json has no {key!r}; a positive {kind} is needed.", parameter=key)
    return value


def _wrong(key: str, value: Any, kind: str) -> ModelLoadError:
    return ModelLoadError(f"config.json: {key} is {value!r}; a positive {kind} is needed.", parameter=key, value=value)
