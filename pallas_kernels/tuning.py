"""Tuned kernel configs: JSON files in `tuned/`, one per device kind, looked up by exact facts and nearest sizes.

A kernel's config is a frozen dataclass of ints, bools and tuples of them. Its entries hold exact facts (head dim,
dtype, ...), which must agree, and sizes (sequences, keys, ...), of which the nearest entry's win, by the sum of the
distances of their logarithms. Without an entry near enough the kernel's own heuristic decides.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

FOLDER = Path(__file__).with_name("tuned")
_FARTHEST = 3.0
"""In powers of two, summed over the sizes."""

ConfigT = TypeVar("ConfigT")
Facts = Mapping[str, int | str | bool]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tuned case of a kernel."""

    exact: dict[str, int | str | bool]
    sizes: dict[str, int]
    config: dict[str, Any]
    microseconds: float


def device_kind() -> str | None:
    """The kind of the device that is lowered for, by `jax.sharding.use_abstract_mesh`, else of the default device; None
    for a CPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind if device.platform == "gpu" else None
    return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else None


def path_of(kind: str, folder: Path = FOLDER) -> Path:
    """The file of a device kind."""
    return folder / (re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_") + ".json")


def from_dict(config_class: Callable[..., ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """The config with these fields; JSON's lists become tuples. ValueError for a field that it has not."""
    names = {field.name for field in dataclasses.fields(config_class)}  # pyright: ignore[reportArgumentType]
    unknown = sorted(set(values) - names)
    if unknown:
        name = getattr(config_class, "__name__", str(config_class))
        raise ValueError(f"config of {name} has fields {unknown}; it takes {sorted(names)}: tune the kernel again")
    return config_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


@functools.cache
def _entries(path: Path) -> dict[str, tuple[Entry, ...]]:
    if not path.exists():
        return {}
    kernels = json.loads(path.read_text())["kernels"]
    return {kernel: tuple(Entry(**entry) for entry in entries) for kernel, entries in kernels.items()}


def lookup(
    kernel: str,
    config_class: Callable[..., ConfigT],
    exact: Facts,
    sizes: Mapping[str, int],
    fallback: Callable[[], ConfigT],
    *,
    kind: str | None = None,
    folder: Path = FOLDER,
) -> ConfigT:
    """The config of the nearest tuned case, or the fallback's.

    Args:
        kernel: Name of the kernel in the files.
        config_class: Dataclass of its configs.
        exact: Facts that an entry must have, all of them equal.
        sizes: Positive sizes; an entry must have the same names.
        fallback: The heuristic.
        kind: Device kind; None takes `device_kind()` (a CPU has no entries).
        folder: Where the files are.
    """
    kind = kind or device_kind()
    if kind is None:
        return fallback()
    best, nearest = None, _FARTHEST
    for entry in _entries(path_of(kind, folder)).get(kernel, ()):
        if entry.exact != dict(exact) or entry.sizes.keys() != sizes.keys():
            continue
        distance = sum(abs(math.log2(max(1, size) / max(1, entry.sizes[name]))) for name, size in sizes.items())
        if distance <= nearest:
            best, nearest = entry, distance
    return fallback() if best is None else from_dict(config_class, best.config)


def record(kernel: str, entry: Entry, *, kind: str, folder: Path = FOLDER) -> Path:
    """Stores an entry, in place of the one with the same facts and sizes. Returns the file's path."""
    path = path_of(kind, folder)
    kernels = {name: list(entries) for name, entries in _entries(path).items()}
    kept = [e for e in kernels.get(kernel, []) if (e.exact, e.sizes) != (entry.exact, entry.sizes)]
    kernels[kernel] = sorted([*kept, entry], key=lambda e: (sorted(map(str, e.exact.items())), sorted(e.sizes.items())))
    plain = {name: [dataclasses.asdict(e) for e in entries] for name, entries in sorted(kernels.items())}
    lines = [
        f"    {json.dumps(name)}: [\n" + ",\n".join(f"      {json.dumps(e)}" for e in entries) + "\n    ]"
        for name, entries in plain.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f'{{\n  "device_kind": {json.dumps(kind)},\n  "jax": {json.dumps(jax.__version__)},\n'
    path.write_text(head + '  "kernels": {\n' + ",\n".join(lines) + "\n  }\n}\n")
    _entries.cache_clear()
    return path
