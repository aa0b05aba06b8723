"""Run by test_streaming.py: restores a leaf from Orbax with the memory for one copy of it on the host."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.weights.streaming_check import MIB, data_bytes
from vjax.parallel.sharding import make_mesh, named_sharding
from vjax.weights import orbax_parts
from vjax.weights.hub import ORBAX_FOLDER
from vjax.weights.manifest import Manifest, StoredLeaf, files_of

LEAF_BYTES = 128 * MIB
AXES = ("vocab", "embed")


def write_leaf(folder: Path) -> jax.Array:
    """A chunk of it is the whole leaf, so that all of it is being read at once, however many threads there are."""
    orbax_parts.CHUNK_BYTES = LEAF_BYTES
    leaf = jax.lax.bitcast_convert_type(jnp.arange(LEAF_BYTES // 2, dtype=jnp.uint16), jnp.bfloat16).reshape(-1, 8192)
    parts = folder / ORBAX_FOLDER
    parts.mkdir(parents=True)
    orbax_parts.save_part(parts / "part-00000", {"leaf": leaf}, {"leaf": AXES})
    stored = {"leaf": StoredLeaf(leaf.shape, leaf.dtype.name, "part-00000")}
    Manifest("LlamaForCausalLM", stored, files_of(parts), {}).write(folder)
    return leaf


if __name__ == "__main__":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # so that as many threads run on every machine
    folder, allowed = Path(sys.argv[1]), int(sys.argv[2]) * MIB
    expected = write_leaf(folder)
    target = jax.ShapeDtypeStruct(expected.shape, expected.dtype, sharding=named_sharding(make_mesh(), AXES))
    unlimited = resource.getrlimit(resource.RLIMIT_DATA)
    limit = data_bytes() + allowed
    within_limit = []
    device_put = jax.device_put

    def to_device(*args, **kwargs) -> jax.Array:
        # Of another device the copy would not be on the host.
        within_limit.append(resource.getrlimit(resource.RLIMIT_DATA)[0] == limit)
        resource.setrlimit(resource.RLIMIT_DATA, unlimited)
        return device_put(*args, **kwargs)

    jax.device_put = to_device
    resource.setrlimit(resource.RLIMIT_DATA, (limit, unlimited[1]))
    try:
        np.ones(2 * LEAF_BYTES, np.uint8)
    except MemoryError:
        twice_fits = False
    else:
        twice_fits = True
    [(_, leaf)] = orbax_parts.restore_leaves(folder, {"leaf": target}, "LlamaForCausalLM")
    equal = np.array_equal(np.asarray(leaf).view(np.uint16), np.asarray(expected).view(np.uint16))
    print(json.dumps({"within_limit": within_limit, "twice_fits": twice_fits, "equal": equal}))
