"""Run by test_tensor_parallel.py in a process with two CPU devices: equal logits on one device and on two."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from tests.models import harness
from vjax.models.decoder import AttentionMetadata
from vjax.models.functional import build_model
from vjax.models.registry import arch_config_from_hf, read_hf_config
from vjax.parallel.sharding import KV_CACHE_AXES, make_mesh, named_sharding
from vjax.weights.loader import load_weights


def logits_on(path: str, num_devices: int, prompt: np.ndarray) -> np.ndarray:
    mesh = make_mesh(jax.devices()[:num_devices])
    model = build_model(arch_config_from_hf(read_hf_config(path)), jnp.float32, mesh)
    leaves = load_weights(model, path, mesh=mesh, show_progress=False)
    cache_sharding = named_sharding(mesh, KV_CACHE_AXES)
    kv = jax.tree.map(lambda array: jax.device_put(array, cache_sharding), harness.empty_cache(model, 4))
    num_tokens = len(prompt)

    @jax.jit
    def step(leaves, kv, ids, positions, slots):
        plan = pallas_kernels.plan_attention(
            jnp.array([[0, 0, 0], [1, 2, 3]], jnp.int32),
            jnp.array([1], jnp.int32),
            jnp.array([0, num_tokens], jnp.int32),
            jnp.array([num_tokens], jnp.int32),
            num_tokens=num_tokens,
            num_q_heads=model.arch.num_heads // num_devices,
            num_kv_heads=model.arch.num_kv_heads // num_devices,
            head_dim=model.arch.head_dim,
            block_size=harness.BLOCK_SIZE,
            dtype=model.dtype,
            decode_only=False,
            implementation="xla",
        )
        hidden, kv = model.forward(leaves, ids, kv, AttentionMetadata(positions, slots, plan))
        return model.logits(model.head_leaves(leaves), hidden), kv

    positions = np.arange(num_tokens, dtype=np.int32)
    logits, kv = step(leaves, kv, prompt, positions, positions + harness.BLOCK_SIZE)
    assert len(logits.sharding.device_set) == num_devices
    assert len(kv[0][0].sharding.device_set) == num_devices
    return np.asarray(logits)


if __name__ == "__main__":
    prompt = np.random.default_rng(0).integers(3, 100, 40).astype(np.int32)
    np.testing.assert_allclose(logits_on(sys.argv[1], 2, prompt), logits_on(sys.argv[1], 1, prompt), atol=1e-4)
