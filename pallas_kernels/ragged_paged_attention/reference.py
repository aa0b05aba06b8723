"""The definition of ragged paged attention: every token on its own, dense, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.validation import Array


def ragged_paged_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    block_tables: Array,
    table_rows: Array,
    cu_q_lens: Array,
    kv_lens: Array,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> jax.Array:
    """f32[T, H, D] from q [T, H, D], caches [num_blocks, KVH, block_size, D] and the arguments of plan_attention."""
    block_tables, table_rows, cu_q_lens, kv_lens = map(jnp.asarray, (block_tables, table_rows, cu_q_lens, kv_lens))
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    group = num_q_heads // num_kv_heads

    def keys_or_values(cache: jax.Array, row: jax.Array, scale: jax.Array | None) -> jax.Array:
        stored = jnp.moveaxis(cache[block_tables[row]], 0, 1).reshape(num_kv_heads, -1, head_dim).astype(jnp.float32)
        return stored if scale is None else stored * scale[:, None, None]

    def one_token(token: jax.Array) -> jax.Array:
        seq = jnp.clip(jnp.sum(token >= cu_q_lens[1:], dtype=jnp.int32), 0, kv_lens.shape[0] - 1)
        position = kv_lens[seq] - (cu_q_lens[seq + 1] - token)
        key_position = jnp.arange(block_tables.shape[1] * k_cache.shape[2], dtype=jnp.int32)
        visible = (key_position <= position) & (token < cu_q_lens[-1])
        if sliding_window is not None:
            visible &= key_position > position - sliding_window
        heads = q[token].reshape(num_kv_heads, group, head_dim).astype(jnp.float32)
        keys = keys_or_values(k_cache, table_rows[seq], k_scale)
        scores = jnp.einsum("kgd,kcd->kgc", heads, keys, precision="highest") * scale
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(visible, scores, -jnp.inf)
        if sinks is not None:  # one more key, whose value is zero
            scores = jnp.concatenate([scores, sinks.reshape(num_kv_heads, group, 1)], axis=-1)
        weights = jnp.where(visible.any(), jax.nn.softmax(scores, axis=-1), 0.0)[..., : visible.size]
        values = jnp.where(visible[:, None], keys_or_values(v_cache, table_rows[seq], v_scale), 0.0)
        return jnp.einsum("kgc,kcd->kgd", weights, values, precision="highest").reshape(num_q_heads, head_dim)

    return jax.lax.map(one_token, jnp.arange(num_tokens, dtype=jnp.int32))
