"""What the implementations of rope_write_kv get besides the caches, as one record."""

from __future__ import annotations

import dataclasses

import jax

Heads = jax.Array | tuple[jax.Array, jax.Array, jax.Array]
"""[T, KVH, G + 2, D], or (q [T, H, D], k [T, KVH, D], v [T, KVH, D])."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewHeads:
    """A step's heads and what normalises and rotates them; the fields are arguments of rope.rope_write_kv."""

    qkv: Heads
    cos: jax.Array
    sin: jax.Array
    q_norm: jax.Array | None
    k_norm: jax.Array | None
    eps: float = dataclasses.field(metadata={"static": True})

    def unpacked(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(q [T, H, D], k [T, KVH, D], v [T, KVH, D])."""
        if isinstance(self.qkv, tuple):
            return self.qkv
        num_tokens, _, _, head_dim = self.qkv.shape
        return self.qkv[:, :, :-2].reshape(num_tokens, -1, head_dim), self.qkv[:, :, -2], self.qkv[:, :, -1]
