"""Body of the Hopper attention kernel: one kernel for decode, prefill and mixtures.

A CTA of one warpgroup owns (query tile, KV head, split of the keys). The tile's tokens and the query heads that share
the KV head are packed into the 64 rows of a wgmma. Keys and values come in chunks of 64, one TMA per block of the
block table, a few chunks ahead; two CTAs share an SM, so that one computes while the other waits. FlashAttention's
online softmax runs in base 2.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import load
from pallas_kernels.ragged_paged_attention.plan import MOSAIC_TILE_ROWS

CHUNK_KEYS = 64
_ZERO_COLUMNS = 64  # columns rewritten at a time, to spare registers
_LOG2E = math.log2(math.e)
_MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Config:
    """Static description of one launch.

    Attributes:
        rows: Rows of a tile that are loaded and stored, a multiple of 8.
        group: Query heads per KV head.
        head_dim: 64, 128 or 256.
        block_size: Tokens per block of the cache.
        splits: CTAs per (tile, KV head).
        stages: Chunks in flight.
        scale, sliding_window, soft_cap: As in the API.
        zero_empty: Empty tiles write zeros instead of nothing.
        interpret: Run by the CPU interpreter.
    """

    rows: int
    group: int
    head_dim: int
    block_size: int
    splits: int
    stages: int
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    zero_empty: bool
    interpret: bool

    @property
    def copy_keys(self) -> int:
        """Keys that one TMA brings: a block, or a chunk's worth of a larger block."""
        return min(self.block_size, CHUNK_KEYS)

    @property
    def copies(self) -> int:
        return CHUNK_KEYS // self.copy_keys

    @property
    def skips_masks(self) -> bool:
        """Whether chunks that need no mask get a loop of their own; at head_dim 256 two loops spill registers."""
        return self.sliding_window is None and self.head_dim < 256


def kernel(config: Config, tables, table_row, tile_len, tile_pos, q_gmem, k_gmem, v_gmem, *outputs, **scratch) -> None:
    """Body of one CTA. Tiles run last to first: the later tiles of a prefill have the most keys."""
    tile = tile_len.shape[0] - 1 - lax.axis_index("tile")
    length = tile_len[tile]
    work = functools.partial(_tile, config, tile, tables, table_row, length, tile_pos, q_gmem, k_gmem, v_gmem, outputs)
    if config.zero_empty:
        work(**scratch)
    else:
        pl.when(length > 0)(functools.partial(work, **scratch))


def _tile(
    config: Config,
    tile: Any,
    tables: Any,
    table_row: Any,
    length: Any,
    tile_pos: Any,
    q_gmem: Any,
    k_gmem: Any,
    v_gmem: Any,
    outputs: tuple[Any, ...],
    *,
    q_smem: Any,
    k_smem: Any,
    v_smem: Any,
    q_barrier: Any,
    k_barriers: Any,
    v_barriers: Any,
    partial_smem: Any = None,
) -> None:
    head, split = lax.axis_index("kv_head"), lax.axis_index("split")
    row, position = table_row[tile], tile_pos[tile]
    end = position + length
    begin = jnp.int32(0)
    if config.sliding_window is not None:
        begin = jnp.maximum(position - (config.sliding_window - 1), 0)
    first, count = _chunk_range(config, begin, end, split)

    def block_ids(chunk: Any) -> tuple[Any, ...]:
        """Ids of the blocks of a chunk; past the table's end, those of its last column."""
        columns = [chunk * CHUNK_KEYS // config.block_size + j for j in range(config.copies)]
        return tuple(tables[row, jnp.minimum(column, tables.shape[1] - 1)] for column in columns)

    def fetch(gmem: Any, smem: Any, barriers: Any, i: Any, ids: tuple[Any, ...]) -> None:
        """Starts the copies of the i-th chunk of this CTA."""
        slot = lax.rem(i, jnp.int32(config.stages))
        offset = lax.rem((first + i) * CHUNK_KEYS, jnp.int32(config.block_size)) if config.copies == 1 else 0
        for j, block in enumerate(ids):
            source = gmem.at[block, head, pl.ds(offset, config.copy_keys)]
            target = smem.at[slot, pl.ds(j * config.copy_keys, config.copy_keys)]
            plgpu.copy_gmem_to_smem(source, target, barriers.at[slot])

    plgpu.copy_gmem_to_smem(q_gmem.at[tile, head], q_smem.at[pl.ds(0, config.rows)], q_barrier)
    for i in range(config.stages):

        @pl.when(i < count)
        def _prologue(i=i):
            ids = block_ids(first + i)
            fetch(k_gmem, k_smem, k_barriers, jnp.int32(i), ids)
            fetch(v_gmem, v_smem, v_barriers, jnp.int32(i), ids)

    plgpu.barrier_wait(q_barrier)

    def step(i: Any, carry: Any, *, masked: bool) -> Any:
        accumulator, maximum, total, ids = carry
        slot = lax.rem(i, jnp.int32(config.stages))
        ahead = i + config.stages
        next_ids = block_ids(first + ahead + 1)

        plgpu.barrier_wait(k_barriers.at[slot])
        scores = _scores(config, q_smem, k_smem.at[slot])
        pl.when(ahead < count)(lambda: fetch(k_gmem, k_smem, k_barriers, ahead, ids))
        if masked:
            scores = jnp.where(_visible(config, first + i, position), scores, _MASKED)

        new_maximum = jnp.maximum(maximum, scores.max(axis=1))
        correction = jnp.exp2(maximum - new_maximum)
        weights = jnp.exp2(scores - lax.broadcast_in_dim(new_maximum, scores.shape, [0]))
        total = total * correction + weights.sum(axis=1)
        accumulator = accumulator * lax.broadcast_in_dim(correction, accumulator.shape, [0])

        plgpu.barrier_wait(v_barriers.at[slot])
        if masked:
            _zero_unused_values(config, v_smem.at[slot], first + i, begin, end)
        accumulator = _add_product(config, accumulator, weights.astype(q_smem.dtype), v_smem.at[slot])
        pl.when(ahead < count)(lambda: fetch(v_gmem, v_smem, v_barriers, ahead, ids))
        return accumulator, new_maximum, total, next_ids

    rows = plgpu.Layout.WGMMA.reduce(1)
    carry = (
        plgpu.layout_cast(jnp.zeros((MOSAIC_TILE_ROWS, config.head_dim), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((MOSAIC_TILE_ROWS,), _MASKED, jnp.float32), rows),
        plgpu.layout_cast(jnp.zeros((MOSAIC_TILE_ROWS,), jnp.float32), rows),
        block_ids(first + config.stages),
    )
    unmasked = jnp.int32(0)
    if config.skips_masks:  # chunks that every row of the tile sees whole need no mask
        unmasked = jnp.clip((position + 1) // CHUNK_KEYS - first, 0, count)
        carry = lax.fori_loop(0, unmasked, functools.partial(step, masked=False), carry)
    accumulator, maximum, total, _ = lax.fori_loop(unmasked, count, functools.partial(step, masked=True), carry)

    total_or_one = jnp.where(total == 0, 1.0, total)
    accumulator = accumulator / lax.broadcast_in_dim(total_or_one, accumulator.shape, [0])
    if config.splits == 1:
        q_smem[...] = accumulator.astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[pl.ds(0, config.rows)], outputs[0].at[tile, head])
    else:
        partial_smem[...] = accumulator
        outputs[1][split, tile, head] = jnp.where(total == 0, _MASKED, maximum + jnp.log2(total_or_one))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(partial_smem.at[pl.ds(0, config.rows)], outputs[0].at[split, tile, head])
    plgpu.wait_smem_to_gmem(0)


def _chunk_range(config: Config, begin: Any, end: Any, split: Any) -> tuple[Any, Any]:
    """(first chunk, number of chunks) of this CTA, of the chunks that hold the keys [begin, end)."""
    first, stop = begin // CHUNK_KEYS, (end + (CHUNK_KEYS - 1)) // CHUNK_KEYS
    if config.splits == 1:
        return first, jnp.maximum(stop - first, 0)
    share = (stop - first + (config.splits - 1)) // config.splits
    first = first + split * share
    return first, jnp.clip(stop - first, 0, share)


def _scores(config: Config, q_smem: Any, k_smem: Any) -> jax.Array:
    """f32[64, CHUNK_KEYS] scores times log2(e), soft-capped."""

    def product(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, q_smem, k_smem.transpose((1, 0)))
        return accumulator[...]

    scores = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((MOSAIC_TILE_ROWS, CHUNK_KEYS), jnp.float32))
    if config.soft_cap is None:
        return scores * (config.scale * _LOG2E)
    return jnp.tanh(scores * (config.scale / config.soft_cap)) * (config.soft_cap * _LOG2E)


def _visible(config: Config, chunk: Any, position: Any) -> jax.Array:
    """bool[64, CHUNK_KEYS]: whether a row sees a key."""
    shape, layout = (MOSAIC_TILE_ROWS, CHUNK_KEYS), plgpu.Layout.WGMMA
    key = chunk * CHUNK_KEYS + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
    token = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
    row = position + lax.div(token, jnp.full(shape, config.group, jnp.int32))
    visible = key <= row
    if config.sliding_window is not None:
        visible &= key > row - config.sliding_window
    return visible


def _zero_unused_values(config: Config, v_smem: Any, chunk: Any, begin: Any, end: Any) -> None:
    """Zeroes the values outside [begin, end): their weight is 0, but an unwritten slot may hold NaN."""
    start = chunk * CHUNK_KEYS

    @pl.when((start + CHUNK_KEYS > end) | (start < begin))
    def _():
        shape = (CHUNK_KEYS, _ZERO_COLUMNS)
        key = start + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        for column in range(0, config.head_dim, _ZERO_COLUMNS):
            part = v_smem.at[:, pl.ds(column, _ZERO_COLUMNS)]
            values = load(part, plgpu.Layout.WGMMA)
            part[...] = jnp.where((key >= begin) & (key < end), values, jnp.zeros_like(values))
        plgpu.commit_smem()


def _add_product(config: Config, accumulator: jax.Array, weights: jax.Array, v_smem: Any) -> jax.Array:
    """accumulator + weights @ values. Nothing may come between this wgmma and its wait.

    The weights are the wgmma's operand in registers, and ptxas before CUDA 13.3 may hand those registers to later
    instructions while the wgmma still reads them.
    """
    if config.interpret:  # the interpreter has no wgmma that accumulates in place; its plain read needs a fence
        product = jnp.dot(weights, v_smem[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()
        return accumulator + product
    product = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, v_smem))
    return product(plgpu.WGMMAAccumulatorRef.init(accumulator))  # pyright: ignore[reportReturnType]
