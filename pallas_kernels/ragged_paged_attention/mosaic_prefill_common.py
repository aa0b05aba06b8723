"""What the warpgroups of the prefill kernel share: its configuration, its refs, and which work a CTA takes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention import plan_prefill as plan

WARPGROUP_ROWS = 64
WARPS = 4
OUTPUT_COLUMNS = 128
"""Columns of the output that are staged at a time."""

OUTPUT_TRANSFORMS = (plgpu.TilingTransform((1, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Config:
    """How a launch is cut and scheduled; any choice gives the same result.

    Attributes:
        warpgroups: Compute warpgroups of a CTA, 64 rows each.
        tile_tokens: Query tokens of an item; its rows are tile_tokens tokens of 64 * warpgroups / tile_tokens heads.
        tile_keys: Keys of a tile, 64 or a multiple.
        stages: Key tiles (and value tiles) in shared memory.
        registers: Registers per thread of a compute warpgroup and of the producer, multiples of 8.
        num_ctas: CTAs of the persistent grid.
    """

    warpgroups: int = 2
    tile_tokens: int = 128
    tile_keys: int = 128
    stages: int = 2
    registers: tuple[int, int] = (232, 40)
    num_ctas: int = 132

    @property
    def heads(self) -> int:
        """Query heads of an item."""
        return self.warpgroups * WARPGROUP_ROWS // self.tile_tokens

    @property
    def segment_rows(self) -> int:
        """Consecutive rows of a warpgroup that belong to one head."""
        return min(self.tile_tokens, WARPGROUP_ROWS)

    @property
    def segments(self) -> int:
        """Heads of a warpgroup."""
        return WARPGROUP_ROWS // self.segment_rows

    def copy_keys(self, block_size: int) -> int:
        """Keys that one TMA brings: a block, or each warp's share of a tile."""
        return min(block_size, self.tile_keys // WARPS)

    def copies(self, block_size: int) -> int:
        return self.tile_keys // self.copy_keys(block_size)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is computed: shapes and options.

    Attributes:
        group: Query heads per KV head.
        num_heads, head_dim, block_size: Of queries and cache.
        scale, sliding_window, soft_cap: As in the API.
        sinks: Whether there is a logit per head that takes part in the softmax without a value.
        interpret: Run by the CPU interpreter.
    """

    group: int
    num_heads: int
    head_dim: int
    block_size: int
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    sinks: bool
    interpret: bool

    @property
    def factor(self) -> float:
        """What turns the scores that the softmax gets into logarithms of base 2."""
        return self.scale * LOG2E if self.soft_cap is None else self.soft_cap * LOG2E


@dataclasses.dataclass(frozen=True)
class Item:
    """Traced scalars of one item. Key tiles are numbered from 0; `last` downwards to `last - steps + 1` are used."""

    start: Any
    skip: Any
    stop: Any
    position: Any
    table_row: Any
    head: Any
    begin: Any  # keys before it are outside every row's window
    end: Any
    steps: Any
    last: Any


@dataclasses.dataclass(frozen=True)
class Cta:
    """The refs of one CTA. `*_full` barriers complete when data is in shared memory, `*_free` when it has been used.

    Attributes:
        kv_full: Of the keys' slots, the values' slots, and one for values that the producer changes before it hands
            them on. One array, because each array of barriers costs a register.
        kv_free: Of the keys' slots and the values' slots.
        fp8_smem: Where the tiles of an fp8 cache arrive: one of keys and one of values.
        fp8_full: Barriers of these two.
    """

    config: Config
    problem: Problem
    tables: Any
    tiles: Any
    num_tiles: Any
    q_gmem: Any
    k_gmem: Any
    v_gmem: Any
    sinks: Any
    output: Any
    q_smem: Any
    k_smem: Any
    v_smem: Any
    o_smem: Any
    q_full: Any
    q_free: Any
    kv_full: Any
    kv_free: Any
    fp8_smem: Any = None
    fp8_full: Any = None

    def num_items(self) -> Any:
        """Items of this CTA: CTAs take them in rows, every other row backwards, which evens out their lengths."""
        ctas, cta = self.config.num_ctas, lax.axis_index("cta")
        items = self.num_tiles[0] * (self.problem.num_heads // self.config.heads)
        rounds, rest = lax.div(items, jnp.int32(ctas)), lax.rem(items, jnp.int32(ctas))
        place = jnp.where(lax.rem(rounds, 2) == 0, cta, ctas - 1 - cta)
        return rounds + (place < rest).astype(jnp.int32)

    def item(self, index: Any) -> Item:
        config, problem, ctas, cta = self.config, self.problem, self.config.num_ctas, lax.axis_index("cta")
        place = jnp.where(lax.rem(index, 2) == 0, cta, ctas - 1 - cta)
        head_tiles = problem.num_heads // config.heads
        rank = index * ctas + place
        tile, head = lax.div(rank, jnp.int32(head_tiles)), lax.rem(rank, jnp.int32(head_tiles)) * config.heads
        skip, position, end = self.tiles[tile, plan.SKIP], self.tiles[tile, plan.POSITION], self.tiles[tile, plan.END]
        begin = jnp.int32(0)
        if problem.sliding_window is not None:
            begin = jnp.maximum(position + skip - (problem.sliding_window - 1), 0)
        first = lax.div(begin, jnp.int32(config.tile_keys))
        last = jnp.maximum(lax.div(end + (config.tile_keys - 1), jnp.int32(config.tile_keys)) - 1, 0)
        return Item(
            start=self.tiles[tile, plan.START],
            skip=skip,
            stop=self.tiles[tile, plan.STOP],
            position=position,
            table_row=self.tiles[tile, plan.TABLE_ROW],
            head=head,
            begin=begin,
            end=end,
            steps=last - first + 1,
            last=last,
        )

    def slot(self, count: Any) -> Any:
        return lax.rem(count, jnp.int32(self.config.stages))

    def k_full(self, slot: Any) -> Any:
        return self.kv_full.at[slot]

    def v_full(self, slot: Any) -> Any:
        return self.kv_full.at[slot + self.config.stages]

    @property
    def v_unfinished(self) -> Any:
        return self.kv_full.at[2 * self.config.stages]

    def k_free(self, slot: Any) -> Any:
        return self.kv_free.at[slot]

    def v_free(self, slot: Any) -> Any:
        return self.kv_free.at[slot + self.config.stages]

    def segment(self, item: Item, warpgroup: Any, segment: int) -> tuple[Any, Any]:
        """(first token, head) of a run of segment_rows rows."""
        row = warpgroup * WARPGROUP_ROWS + segment * self.config.segment_rows
        tokens = self.config.tile_tokens
        groups = lax.div(item.start + lax.rem(jnp.int32(row), jnp.int32(tokens)), jnp.int32(plan.ROW_ALIGNMENT))
        return groups * plan.ROW_ALIGNMENT, item.head + lax.div(jnp.int32(row), jnp.int32(tokens))
