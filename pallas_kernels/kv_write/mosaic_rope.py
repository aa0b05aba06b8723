"""Head norm, rope and KV write for Hopper in one Pallas Mosaic GPU kernel: a token's heads are read and written once.

Bound by memory for prefill, `4 * (H + KVH) * D` bytes a token there and back; for decode it replaces the launches of
the slices, the norms, the rotation and the write by one.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.kv_write.head_rows import HeadRows, head_rows
from pallas_kernels.kv_write.new_heads import NewHeads
from pallas_kernels.mosaic import interpret_params, load


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Static facts of one call. `group` is 0 when q, k and v are separate arrays."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    group: int
    eps: float
    normed: bool

    @property
    def q_tile(self) -> HeadRows:
        return head_rows(self.group or self.num_q_heads, self.head_dim // 2)

    @property
    def kv_tile(self) -> HeadRows:
        return head_rows(self.num_kv_heads, self.head_dim // 2)


def rope_write_kv(
    new: NewHeads, k_cache: jax.Array, v_cache: jax.Array, slots: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See rope.rope_write_kv; `interpret` runs the kernel on the CPU with race detection."""
    num_tokens = slots.shape[0]
    _, num_kv_heads, _, head_dim = k_cache.shape
    if isinstance(new.qkv, tuple):
        heads, group, num_q_heads = new.qkv, 0, new.qkv[0].shape[1]
    else:
        heads, group = (new.qkv,), new.qkv.shape[2] - 2
        num_q_heads = num_kv_heads * group
    shape = _Shape(
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        group=group,
        eps=new.eps,
        normed=new.q_norm is not None,
    )
    kernel = plgpu.kernel(
        functools.partial(_kernel, shape),
        out_type=jax.ShapeDtypeStruct((num_tokens, shape.num_q_heads, head_dim), k_cache.dtype),
        grid=(num_tokens,),
        grid_names=("token",),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            # Every layout is given; inferring them takes minutes.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret_params(interpret),
        kernel_name="rope_write_kv",
    )
    norms = [norm.astype(jnp.float32) for norm in (new.q_norm, new.k_norm) if norm is not None]
    k_ref, v_ref = jax.new_ref(k_cache), jax.new_ref(v_cache)
    q = kernel(slots, new.cos, new.sin, *norms, *heads, k_ref, v_ref)
    return q, jax.freeze(k_ref), jax.freeze(v_ref)


def _kernel(shape: _Shape, slots: Any, cos: Any, sin: Any, *refs: Any) -> None:
    """Body of one CTA: one token."""
    norms, refs = (refs[:2], refs[2:]) if shape.normed else ((None, None), refs)
    heads, (k_cache, v_cache, q_out) = refs[:-3], refs[-3:]
    token = lax.axis_index("token")
    half, block_size = shape.head_dim // 2, k_cache.shape[2]
    halves = (pl.ds(0, half), pl.ds(half, half))
    slot = slots[token]
    q_tile, kv_tile = shape.q_tile, shape.kv_tile
    kv_windows = [pl.ds(start, kv_tile.rows) for start in kv_tile.windows(shape.num_kv_heads)]
    if shape.group:
        qkv = heads[0].at[token]
        starts = [(head, start) for head in range(shape.num_kv_heads) for start in q_tile.windows(shape.group)]
        q_windows = [pl.ds(head * shape.group + start, q_tile.rows) for head, start in starts]
        q = [[qkv.at[head, pl.ds(start, q_tile.rows), h] for h in halves] for head, start in starts]
        k = [[qkv.at[w, shape.group, h] for h in halves] for w in kv_windows]
        v = [[qkv.at[w, shape.group + 1, h] for h in halves] for w in kv_windows]
    else:
        q_windows = [pl.ds(start, q_tile.rows) for start in q_tile.windows(shape.num_q_heads)]
        q = [[heads[0].at[token, w, h] for h in halves] for w in q_windows]
        k = [[heads[1].at[token, w, h] for h in halves] for w in kv_windows]
        v = [[heads[2].at[token, w, h] for h in halves] for w in kv_windows]

    def fetch(tiles: list, tile: HeadRows) -> list:
        return [[load(ref, tile.layout) for ref in pair] for pair in tiles]

    q, k, v = fetch(q, q_tile), fetch(k, kv_tile), fetch(v, kv_tile)
    turn_q = _turn(shape, q_tile, cos.at[token], sin.at[token], norms[0])
    turn_k = _turn(shape, kv_tile, cos.at[token], sin.at[token], norms[1])

    @pl.when(slot >= 0)
    def _():
        block, offset = lax.div(slot, block_size), lax.rem(slot, block_size)
        for window, key, value in zip(kv_windows, k, v, strict=True):
            for h, turned, plain in zip(halves, turn_k(key), value, strict=True):
                k_cache[block, window, offset, h] = turned.astype(k_cache.dtype)
                v_cache[block, window, offset, h] = plain

    for window, query in zip(q_windows, q, strict=True):
        for h, turned in zip(halves, turn_q(query), strict=True):
            q_out[token, window, h] = turned.astype(q_out.dtype)


def _turn(shape: _Shape, tile: HeadRows, cos: Any, sin: Any, norm: Any) -> Any:
    """A function from the two halves of a tile of heads to their rotated halves in float32."""
    size, half = (tile.rows, tile.width), shape.head_dim // 2
    row = tile.layout.reduce(0)

    def spread(ref: Any) -> jax.Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(load(ref, row), size, (1,)), tile.layout)

    c, s = spread(cos), spread(sin)
    weights = None if norm is None else [spread(norm.at[pl.ds(start, half)]) for start in (0, half)]

    def turned(halves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, y = (part.astype(jnp.float32) for part in halves)
        if weights is not None:
            factor = lax.rsqrt(jnp.sum(x * x + y * y, axis=1) / shape.head_dim + shape.eps)
            factor = plgpu.layout_cast(lax.broadcast_in_dim(factor, size, (0,)), tile.layout)
            x, y = x * factor * weights[0], y * factor * weights[1]
        return x * c - y * s, y * c + x * s

    return turned
