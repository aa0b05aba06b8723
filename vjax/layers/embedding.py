"""Token embedding and the language model head."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vjax.layers.linear import contract


def embed_tokens(table: jax.Array, token_ids: jax.Array) -> jax.Array:
    """Rows of table `[vocab, hidden]` for ids i32 `[T]` -> `[T, hidden]`. Ids outside it are clipped."""
    return table.at[token_ids].get(mode="clip")


def head_logits(table: jax.Array, hidden: jax.Array) -> jax.Array:
    """Logits f32 `[R, vocab]` of normed hidden states `[R, hidden]` against the head's table `[vocab, hidden]`."""
    return contract(hidden, table, (1, 1), preferred_element_type=jnp.float32)
