"""Run by test_orbax.py in a process with two CPU devices: leaves from Orbax have the placement and bits of those from
safetensors, and the same logits."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np

from tests.models.tensor_parallel_check import logits_on
from vjax.models.functional import build_model
from vjax.models.registry import arch_config_from_hf, read_hf_config
from vjax.parallel.sharding import make_mesh
from vjax.weights.loader import load_weights

if __name__ == "__main__":
    source, orbax = sys.argv[1:]
    mesh = make_mesh(jax.devices()[:2])
    model = build_model(arch_config_from_hf(read_hf_config(source)), jnp.bfloat16, mesh)
    found, expected = (load_weights(model, path, mesh=mesh) for path in (orbax, source))
    for name, leaf, wanted in zip(model.leaf_names, found, expected, strict=True):
        assert leaf.sharding == wanted.sharding, name
        for shard, wanted_shard in zip(leaf.addressable_shards, wanted.addressable_shards, strict=True):
            assert shard.device == wanted_shard.device and shard.data.shape == wanted_shard.data.shape, name
            np.testing.assert_array_equal(
                np.asarray(shard.data).view(np.uint16), np.asarray(wanted_shard.data).view(np.uint16), name
            )
    split = [leaf for leaf in found if leaf.addressable_shards[0].data.shape != leaf.shape]
    assert len(split) > len(found) // 2
    prompt = np.arange(3, 19, dtype=np.int32)
    np.testing.assert_array_equal(logits_on(orbax, 2, prompt), logits_on(source, 2, prompt))
