"""How checkpoint tensors are joined into one leaf. A packing knows the shapes that it expects, so that a checkpoint can
be judged before a byte of it is read. Functions work on numpy and jax arrays alike; no jax import.

Checkpoints store a linear layer as `[out, in]`; leaves are `[in, ...out]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Packing:
    """`source_shapes(leaf_shape)` gives the shape of each source tensor; `pack(xp, sources, leaf_shape)` joins them,
    with the functions of xp (numpy or jax.numpy); `unpack(leaf)` gives the sources back."""

    source_shapes: Callable[[Shape], tuple[Shape, ...]]
    pack: Callable[[Any, list[Any], Shape], Any]
    unpack: Callable[[Any], list[Any]]


def _qkv_shapes(leaf: Shape) -> tuple[Shape, ...]:
    hidden, kv_heads, slices, head_dim = leaf
    key = (kv_heads * head_dim, hidden)
    return (kv_heads * (slices - 2) * head_dim, hidden), key, key


def _pack_qkv(xp: Any, sources: list[Any], leaf: Shape) -> Any:
    hidden, kv_heads, _, head_dim = leaf
    heads = [source.T.reshape(hidden, kv_heads, -1, head_dim) for source in sources]
    return xp.concatenate(heads, axis=2)


def _unpack_qkv(leaf: Any) -> list[Any]:
    return [part.reshape(leaf.shape[0], -1).T for part in (leaf[:, :, :-2], leaf[:, :, -2], leaf[:, :, -1])]


def _qkv_bias_shapes(leaf: Shape) -> tuple[Shape, ...]:
    kv_heads, slices, head_dim = leaf
    key = (kv_heads * head_dim,)
    return (kv_heads * (slices - 2) * head_dim,), key, key


def _pack_qkv_bias(xp: Any, sources: list[Any], leaf: Shape) -> Any:
    kv_heads, _, head_dim = leaf
    return xp.concatenate([source.reshape(kv_heads, -1, head_dim) for source in sources], axis=1)


def _unpack_qkv_bias(leaf: Any) -> list[Any]:
    return [part.reshape(-1) for part in (leaf[:, :-2], leaf[:, -2], leaf[:, -1])]


#: Packing name (see `WeightRule.packing`) -> packing.
PACKERS: dict[str, Packing] = {
    "copy": Packing(lambda leaf: (leaf,), lambda xp, sources, leaf: sources[0], lambda leaf: [leaf]),
    "transpose": Packing(lambda leaf: (leaf[::-1],), lambda xp, sources, leaf: sources[0].T, lambda leaf: [leaf.T]),
    "qkv": Packing(_qkv_shapes, _pack_qkv, _unpack_qkv),
    "qkv_bias": Packing(_qkv_bias_shapes, _pack_qkv_bias, _unpack_qkv_bias),
    "attention_output": Packing(
        lambda leaf: ((leaf[-1], math.prod(leaf[:-1])),),
        lambda xp, sources, leaf: sources[0].T.reshape(leaf),
        lambda leaf: [leaf.reshape(-1, leaf.shape[-1]).T],
    ),
    "gate_up": Packing(
        lambda leaf: ((leaf[2], leaf[0]), (leaf[2], leaf[0])),
        lambda xp, sources, leaf: xp.stack([source.T for source in sources], axis=1),
        lambda leaf: [leaf[:, 0].T, leaf[:, 1].T],
    ),
    "gate_up_bias": Packing(
        lambda leaf: (leaf[1:], leaf[1:]),
        lambda xp, sources, leaf: xp.stack(sources),
        lambda leaf: [leaf[0], leaf[1]],
    ),
}
