"""The one table that says where arrays live: logical axis -> mesh axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

#: None: the axis is not split. An axis that is missing here is a bug of the caller.
AXIS_RULES: dict[str, str | None] = {
    "vocab": "tp",
    "kv_heads": "tp",
    "mlp": "tp",
    "embed": None,
    "heads_per_kv": None,
    "head_dim": None,
    "gate_up": None,
    "layers": None,
    "blocks": None,
    "block": None,
}

#: Logical axes of one layer's K or V cache `[num_blocks, num_kv_heads, block_size, head_dim]`.
KV_CACHE_AXES = ("blocks", "kv_heads", "block", "head_dim")


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the single axis "tp" over the devices (jax.Device); None: the first device of the default backend."""
    chosen = jax.devices()[:1] if devices is None else devices
    return Mesh(np.array(chosen), ("tp",), axis_types=(AxisType.Auto,))


def partition_spec(logical_axes: Sequence[str | None]) -> PartitionSpec:
    """Mesh axes for the logical axes of an array (None: an axis without a name, not split)."""
    return PartitionSpec(*(None if axis is None else AXIS_RULES[axis] for axis in logical_axes))


def named_sharding(mesh: Mesh, logical_axes: Sequence[str | None]) -> NamedSharding:
    """The placement of an array with these logical axes; `()` replicates."""
    return NamedSharding(mesh, partition_spec(logical_axes))
