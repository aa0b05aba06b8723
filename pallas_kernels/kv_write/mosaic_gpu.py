"""KV write for Hopper in Pallas Mosaic GPU: a token's heads travel GMEM -> SMEM -> cache by TMA, in place."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import interpret_params

_NUM_SMS = 132
_MAX_TOKENS_PER_CTA = 8
_SMEM_BUDGET = 112 * 1024  # half of an SM's shared memory, so that two CTAs fit


def write_kv(
    k_cache: jax.Array, v_cache: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """See api.write_kv; `interpret` runs the kernel on the CPU with race detection."""
    num_tokens, num_kv_heads, head_dim = k.shape
    token_bytes = 2 * num_kv_heads * head_dim * k_cache.dtype.itemsize
    wanted = min(_MAX_TOKENS_PER_CTA, -(-num_tokens // (2 * _NUM_SMS)))
    tokens_per_cta = max(1, min(wanted, _SMEM_BUDGET // token_bytes))
    buffer = plgpu.SMEM((tokens_per_cta, num_kv_heads, head_dim), k_cache.dtype)
    kernel = plgpu.kernel(
        functools.partial(_kernel, tokens_per_cta, k_cache.shape[2]),
        out_type=(),
        scratch_types=[buffer, buffer, plgpu.Barrier(num_arrivals=2, num_barriers=tokens_per_cta)],
        grid=(-(-num_tokens // tokens_per_cta),),
        grid_names=("tokens",),
        interpret=interpret_params(interpret),
        kernel_name="write_kv",
    )
    k_ref, v_ref = jax.new_ref(k_cache), jax.new_ref(v_cache)
    kernel(slots, k.astype(k_cache.dtype), v.astype(v_cache.dtype), k_ref, v_ref)
    return jax.freeze(k_ref), jax.freeze(v_ref)


def _kernel(
    tokens_per_cta: int,
    block_size: int,
    slots: Any,
    k_gmem: Any,
    v_gmem: Any,
    k_cache: Any,
    v_cache: Any,
    k_smem: Any,
    v_smem: Any,
    barriers: Any,
) -> None:
    """Body of one CTA: all loads, then each token's stores as it arrives."""
    num_tokens = k_gmem.shape[0]
    first = lax.axis_index("tokens") * tokens_per_cta
    used, slot = [], []
    for j in range(tokens_per_cta):
        token = first + j
        slot.append(slots[jnp.minimum(token, num_tokens - 1)])
        used.append((token < num_tokens) & (slot[j] >= 0))

        @pl.when(used[j])
        def _load(j=j, token=token):
            plgpu.copy_gmem_to_smem(k_gmem.at[token], k_smem.at[j], barriers.at[j])
            plgpu.copy_gmem_to_smem(v_gmem.at[token], v_smem.at[j], barriers.at[j])

    for j in range(tokens_per_cta):

        @pl.when(used[j])
        def _store(j=j):
            block, offset = lax.div(slot[j], jnp.int32(block_size)), lax.rem(slot[j], jnp.int32(block_size))
            plgpu.barrier_wait(barriers.at[j])
            plgpu.copy_smem_to_gmem(k_smem.at[j], k_cache.at[block, :, offset])
            plgpu.copy_smem_to_gmem(v_smem.at[j], v_cache.at[block, :, offset])

    plgpu.wait_smem_to_gmem(0)
