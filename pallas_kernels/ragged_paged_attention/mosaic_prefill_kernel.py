"""Body of the Hopper prefill attention kernel.

A persistent CTA works through (query tile, query heads) items. Its compute warpgroups own 64 rows each; one more
warpgroup feeds them keys and values, one TMA per block of the block table, and the next item's queries while the last
item is still being computed. The keys of an item are taken from the last tile to the first, so that the masked tiles
come first and the values behind the end of the sequence are zeroed before anything else waits for them.

Within a warpgroup the scores of the next key tile and the product with the values of the present one are issued
together, and the softmax runs while the tensor cores work (FlashAttention-3, Shah et al., arXiv 2407.08608); between
the warpgroups a pair of named barriers makes their issues take turns.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import load
from pallas_kernels.ragged_paged_attention import plan_prefill as plan

WARPGROUP_ROWS = 64
WARPS = 4
_ZERO_SHAPE = (64, 64)  # values rewritten at a time, to spare the producer's registers
_LOG2E = math.log2(math.e)
_MASKED = -(2.0**100)  # a power of two: its product with a factor is exact, so masked - masked is 0
_FIRST_TURN_BARRIER = 8  # named barriers: the lower ones are Mosaic's


@dataclasses.dataclass(frozen=True)
class Config:
    """How a launch is cut and scheduled; any choice gives the same result.

    Attributes:
        warpgroups: Compute warpgroups of a CTA, 64 rows each.
        tile_tokens: Query tokens of an item; its rows are tile_tokens tokens of 64 * warpgroups / tile_tokens heads.
        tile_keys: Keys of a tile, 64 or a multiple.
        stages: Key tiles (and value tiles) in shared memory.
        registers: Registers per thread of a compute warpgroup and of the producer, multiples of 8.
        overlap: Softmax while the products of the same warpgroup run; needs the registers of both.
        take_turns: Warpgroups issue their products in turns.
        output_in_queries: Stage the output in the queries' shared memory, which is smaller but holds up the next load.
        num_ctas: CTAs of the persistent grid.
    """

    warpgroups: int = 2
    tile_tokens: int = 128
    tile_keys: int = 128
    stages: int = 2
    registers: tuple[int, int] = (240, 24)
    overlap: bool = True
    take_turns: bool = True
    output_in_queries: bool = False
    num_ctas: int = 132

    @property
    def heads(self) -> int:
        """Query heads of an item."""
        return self.warpgroups * WARPGROUP_ROWS // self.tile_tokens

    @property
    def segment_rows(self) -> int:
        """Consecutive rows of a warpgroup that belong to one head."""
        return min(self.tile_tokens, WARPGROUP_ROWS)

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
        return self.scale * _LOG2E if self.soft_cap is None else self.soft_cap * _LOG2E


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


def kernel(config: Config, problem: Problem, tables, tiles, num_tiles, q, k, v, sinks, output, **scratch) -> None:
    """Body of one CTA."""
    warpgroup = lax.axis_index("warpgroup")
    items = num_tiles[0] * (problem.num_heads // config.heads)
    body = _Cta(config, problem, tables, tiles, items, q, k, v, sinks, output, **scratch)

    @pl.when(warpgroup < config.warpgroups)
    def _compute():
        plgpu.set_max_registers(config.registers[0], action="increase")
        body.compute(warpgroup)

    @pl.when(warpgroup == config.warpgroups)
    def _produce():
        plgpu.set_max_registers(config.registers[1], action="decrease")
        body.produce()


@dataclasses.dataclass(frozen=True)
class _Cta:
    config: Config
    problem: Problem
    tables: Any
    tiles: Any
    items: Any
    q_gmem: Any
    k_gmem: Any
    v_gmem: Any
    sinks: Any
    output: Any
    q_smem: Any
    k_smem: Any
    v_smem: Any
    o_smem: Any  # (swizzled, rows): two views of one buffer
    q_full: Any
    q_free: Any
    k_full: Any
    k_free: Any
    v_full: Any  # the last one is for the tiles that the producer still changes
    v_free: Any

    # Items -----------------------------------------------------------------------------------------------------------

    def num_items(self) -> Any:
        """Items of this CTA: CTAs take them in rows, every other row backwards, which evens out their lengths."""
        ctas, cta = self.config.num_ctas, lax.axis_index("cta")
        rounds, rest = lax.div(self.items, jnp.int32(ctas)), lax.rem(self.items, jnp.int32(ctas))
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
            start=pl.multiple_of(self.tiles[tile, plan.START], plan.ROW_ALIGNMENT),
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

    # Producer --------------------------------------------------------------------------------------------------------

    def produce(self) -> None:
        def one_item(index: Any, filled: Any) -> Any:
            item = self.item(index)

            def one_tile(step: Any, _: Any) -> None:
                self.load_tile(item, index, step, filled + step)

            lax.fori_loop(0, item.steps, one_tile, None)
            return filled + item.steps

        lax.fori_loop(0, self.num_items(), one_item, jnp.int32(0))

    def load_tile(self, item: Item, index: Any, step: Any, count: Any) -> None:
        """Loads the step-th key tile of an item and with the first one the queries; `count` tiles came before."""
        config, problem = self.config, self.problem
        slot, base = self.slot(count), (item.last - step) * config.tile_keys
        unused = (base + config.tile_keys > item.end) | (base < item.begin)
        v_barrier = self.v_full.at[jnp.where(unused, config.stages, slot)]
        keys, per_warp = config.copy_keys(problem.block_size), config.copies(problem.block_size) // WARPS
        kv_head = lax.div(item.head, jnp.int32(problem.group))

        def one_warp(warp: Any) -> None:
            rows = [pl.multiple_of((warp * per_warp + j) * keys, keys) for j in range(per_warp)]
            columns = [lax.div(base + row, jnp.int32(problem.block_size)) for row in rows]
            blocks = [self.tables[item.table_row, jnp.minimum(c, self.tables.shape[1] - 1)] for c in columns]

            def fetch(gmem: Any, smem: Any, barrier: Any) -> None:
                for row, block in zip(rows, blocks, strict=True):
                    offset = 0
                    if keys < problem.block_size:
                        offset = pl.multiple_of(lax.rem(base + row, jnp.int32(problem.block_size)), keys)
                    source = gmem.at[block, kv_head, pl.ds(offset, keys)]
                    plgpu.copy_gmem_to_smem(source, smem.at[slot, pl.ds(row, keys)], barrier)

            @pl.when(count >= config.stages)
            def _():
                plgpu.barrier_wait(self.k_free.at[slot])

            fetch(self.k_gmem, self.k_smem, self.k_full.at[slot])
            pl.when(step == 0)(lambda: self.load_queries(item, index, warp))

            @pl.when(count >= config.stages)
            def _():
                plgpu.barrier_wait(self.v_free.at[slot])

            fetch(self.v_gmem, self.v_smem, v_barrier)

        plgpu.warp_map(one_warp)
        pl.when(unused)(lambda: self.zero_unused_values(item, slot, base))

    def load_queries(self, item: Item, index: Any, warp: Any) -> None:
        """Warp w loads the rows of the compute warpgroup w."""
        config = self.config
        rows = config.segment_rows
        for warpgroup in range(config.warpgroups):

            @pl.when(warp == warpgroup)
            def _(warpgroup=warpgroup):
                @pl.when(index > 0)
                def _():
                    plgpu.barrier_wait(self.q_free.at[warpgroup])

                for segment in range(WARPGROUP_ROWS // rows):
                    token, head = self.segment(item, warpgroup, segment)
                    source = self.q_gmem.at[pl.ds(token, rows), head]
                    target = self.q_smem.at[warpgroup, pl.ds(segment * rows, rows)]
                    plgpu.copy_gmem_to_smem(source, target, self.q_full.at[warpgroup])

    def segment(self, item: Item, warpgroup: Any, segment: int) -> tuple[Any, Any]:
        """(first token, head) of a run of segment_rows rows."""
        row = warpgroup * WARPGROUP_ROWS + segment * self.config.segment_rows
        tokens = self.config.tile_tokens
        token = item.start + (row % tokens if isinstance(row, int) else lax.rem(row, jnp.int32(tokens)))
        head = item.head + (row // tokens if isinstance(row, int) else lax.div(row, jnp.int32(tokens)))
        return pl.multiple_of(token, plan.ROW_ALIGNMENT), head

    def zero_unused_values(self, item: Item, slot: Any, base: Any) -> None:
        """Zeroes the values outside [begin, end): their weight is 0, but an unwritten slot may hold NaN."""
        plgpu.barrier_wait(self.v_full.at[self.config.stages])
        height, width = _ZERO_SHAPE
        for row in range(0, self.config.tile_keys, height):
            key = base + row + plgpu.broadcasted_iota(jnp.int32, _ZERO_SHAPE, 0, layout=plgpu.Layout.WGMMA)
            used = (key >= item.begin) & (key < item.end)
            for column in range(0, self.problem.head_dim, width):
                part = self.v_smem.at[slot, pl.ds(row, height), pl.ds(column, width)]
                values = load(part, plgpu.Layout.WGMMA)
                part[...] = jnp.where(used, values, jnp.zeros_like(values))
        plgpu.commit_smem()
        for _ in range(self.config.copies(self.problem.block_size)):
            plgpu.barrier_arrive(self.v_full.at[slot])

    # Compute ---------------------------------------------------------------------------------------------------------

    def compute(self, warpgroup: Any) -> None:
        def one_item(index: Any, used: Any) -> Any:
            item = self.item(index)
            self.attend(item, warpgroup, used)
            return used + item.steps

        if self.config.take_turns:  # the last warpgroup gives the first one its first turn
            pl.when(warpgroup == self.config.warpgroups - 1)(lambda: self.pass_turn(warpgroup))
        lax.fori_loop(0, self.num_items(), one_item, jnp.int32(0))
        if self.config.take_turns:
            pl.when(warpgroup == 0)(lambda: self.await_turn(warpgroup))
        plgpu.wait_smem_to_gmem(0)

    def await_turn(self, warpgroup: Any) -> None:
        self.turn("sync", warpgroup)

    def pass_turn(self, warpgroup: Any) -> None:
        self.turn("arrive", lax.rem(warpgroup + 1, jnp.int32(self.config.warpgroups)))

    def turn(self, operation: str, warpgroup: Any) -> None:
        for owner in range(self.config.warpgroups):
            pl.when(warpgroup == owner)(functools.partial(_bar, operation, _FIRST_TURN_BARRIER + owner))

    def attend(self, item: Item, warpgroup: Any, used: Any) -> None:
        """One item of one compute warpgroup; `used` key tiles came before it."""
        config, problem = self.config, self.problem
        maximum, total = self.initial(item, warpgroup)
        slot = self.slot(used)
        plgpu.barrier_wait(self.q_full.at[warpgroup])
        plgpu.barrier_wait(self.k_full.at[slot])
        scores = self.scores(warpgroup, slot)
        plgpu.barrier_arrive(self.k_free.at[slot])
        scores = self.masked(item, warpgroup, 0, self.capped(scores))
        maximum, _, total, weights = self.softmax(scores, maximum, total)
        shape = (WARPGROUP_ROWS, problem.head_dim)
        accumulator = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
        carry = (accumulator, maximum, total, weights.astype(self.q_smem.dtype))

        step = functools.partial(self.step, item, warpgroup, used)
        unmasked, bottom = self.unmasked_steps(item)
        carry = lax.fori_loop(1, unmasked, functools.partial(step, masked=True), carry)
        carry = lax.fori_loop(unmasked, bottom, functools.partial(step, masked=False), carry)
        if problem.sliding_window is not None:
            carry = lax.fori_loop(bottom, item.steps, functools.partial(step, masked=True), carry)
        accumulator, _, total, weights = carry

        plgpu.barrier_arrive(self.q_free.at[warpgroup])
        slot = self.slot(used + item.steps - 1)
        plgpu.barrier_wait(self.v_full.at[slot])
        accumulator = self.add_product(accumulator, weights, self.v_smem.at[slot])
        plgpu.barrier_arrive(self.v_free.at[slot])
        self.store(item, warpgroup, accumulator * lax.broadcast_in_dim(1.0 / total, accumulator.shape, [0]))

    def unmasked_steps(self, item: Item) -> tuple[Any, Any]:
        """Steps [a, b) after the first whose key tiles every row of the item sees whole."""
        tile_keys = jnp.int32(self.config.tile_keys)
        whole = lax.div(jnp.maximum(item.position + item.skip + 1, 0), tile_keys)  # tiles below it need no mask
        first = jnp.clip(item.last - whole + 1, 1, item.steps)
        if self.problem.sliding_window is None:
            return first, item.steps
        low = jnp.maximum(item.position + item.stop - self.problem.sliding_window, 0)  # the last row sees from here on
        bottom = item.last - lax.div(low + (tile_keys - 1), tile_keys) + 1
        return first, jnp.clip(bottom, first, item.steps)

    def step(self, item: Item, warpgroup: Any, used: Any, step: Any, carry: Any, *, masked: bool) -> Any:
        """Scores and softmax of the key tile `step`, product with the values of the tile before it."""
        config = self.config
        accumulator, maximum, total, weights = carry
        slot, before = self.slot(used + step), self.slot(used + step - 1)
        plgpu.barrier_wait(self.k_full.at[slot])
        if config.take_turns:
            self.await_turn(warpgroup)

        def finish(scores: jax.Array) -> Any:
            plgpu.barrier_arrive(self.k_free.at[slot])
            scores = self.capped(scores)
            if masked:
                scores = self.masked(item, warpgroup, step, scores)
            return self.softmax(scores, maximum, total)

        def issued() -> None:
            if config.take_turns:
                self.pass_turn(warpgroup)

        accumulator, (maximum, correction, total, weights) = self.products(
            warpgroup, slot, before, accumulator, weights, issued, finish
        )
        plgpu.barrier_arrive(self.v_free.at[before])
        accumulator = accumulator * lax.broadcast_in_dim(correction, accumulator.shape, [0])
        return accumulator, maximum, total, weights.astype(self.q_smem.dtype)

    def products(
        self,
        warpgroup: Any,
        slot: Any,
        before: Any,
        accumulator: jax.Array,
        weights: jax.Array,
        issued: Callable[[], None],
        finish: Callable[[jax.Array], Any],
    ) -> tuple[jax.Array, Any]:
        """(accumulator + weights @ values of `before`, finish(scores of `slot`)); both products run together."""
        q, k, v = self.q_smem.at[warpgroup], self.k_smem.at[slot], self.v_smem.at[before]
        if self.problem.interpret:  # the interpreter has no wgmma that accumulates in place; plain reads need a fence
            scores = jnp.dot(q[...], k[...].T, preferred_element_type=jnp.float32)
            plgpu.barrier_wait(self.v_full.at[before])
            product = jnp.dot(weights, v[...], preferred_element_type=jnp.float32)
            plgpu.commit_smem()
            issued()
            return accumulator + product, finish(scores)

        def both(score_ref: Any, accumulator_ref: Any) -> Any:
            accumulator_ref[...] = accumulator
            plgpu.wgmma(score_ref, q, k.transpose((1, 0)))
            plgpu.barrier_wait(self.v_full.at[before])
            plgpu.wgmma(accumulator_ref, weights, v)
            if not self.config.overlap:
                plgpu.wgmma_wait(0)
            issued()
            done = finish(plgpu.wgmma_accumulator_load(score_ref, wait_n=1 if self.config.overlap else None))
            return plgpu.wgmma_accumulator_load(accumulator_ref, wait_n=0), done

        shape = (WARPGROUP_ROWS, self.config.tile_keys)
        return pl.run_scoped(both, plgpu.ACC(shape, jnp.float32), plgpu.ACC(accumulator.shape, jnp.float32))

    def scores(self, warpgroup: Any, slot: Any) -> jax.Array:
        q, k = self.q_smem.at[warpgroup], self.k_smem.at[slot]

        def product(reference: Any) -> jax.Array:
            plgpu.wgmma(reference, q, k.transpose((1, 0)))
            return reference[...]

        return pl.run_scoped(product, plgpu.ACC((WARPGROUP_ROWS, self.config.tile_keys), jnp.float32))

    def add_product(self, accumulator: jax.Array, weights: jax.Array, v: Any) -> jax.Array:
        if self.problem.interpret:
            product = jnp.dot(weights, v[...], preferred_element_type=jnp.float32)
            plgpu.commit_smem()
            return accumulator + product
        product = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, v))
        return product(plgpu.ACC.init(accumulator))  # pyright: ignore[reportReturnType]

    # Softmax ---------------------------------------------------------------------------------------------------------

    def initial(self, item: Item, warpgroup: Any) -> tuple[jax.Array, jax.Array]:
        """Running maximum (base 2) and sum of a row before its first key; a sink is as if it were a key."""
        layout = plgpu.Layout.WGMMA.reduce(1)

        def rows(value: float) -> jax.Array:
            return plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), value, jnp.float32), layout)

        if not self.problem.sinks:
            return rows(_MASKED), rows(0.0)
        segments = WARPGROUP_ROWS // self.config.segment_rows
        heads = [self.segment(item, warpgroup, s)[1] for s in range(segments)]
        maximum = lax.broadcast_in_dim(self.sinks[heads[0]] * _LOG2E, (WARPGROUP_ROWS,), [])
        maximum = plgpu.layout_cast(maximum, layout)
        row = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=layout)
        for segment, head in enumerate(heads[1:], start=1):
            sink = lax.broadcast_in_dim(self.sinks[head] * _LOG2E, (WARPGROUP_ROWS,), [])
            maximum = jnp.where(row >= segment * self.config.segment_rows, plgpu.layout_cast(sink, layout), maximum)
        return maximum, rows(1.0)

    def capped(self, scores: jax.Array) -> jax.Array:
        cap = self.problem.soft_cap
        return scores if cap is None else jnp.tanh(scores * (self.problem.scale / cap))

    def masked(self, item: Item, warpgroup: Any, step: Any, scores: jax.Array) -> jax.Array:
        """The scores with those of keys that a row must not see replaced."""
        tokens, layout = self.config.tile_tokens, plgpu.Layout.WGMMA
        row = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=layout) + warpgroup * WARPGROUP_ROWS
        if tokens & (tokens - 1) == 0:
            row = row & (tokens - 1)
        elif self.config.heads > 1:
            row = lax.rem(row, jnp.full(scores.shape, tokens, jnp.int32))
        key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=layout)
        distance = row - key + (item.position - (item.last - step) * self.config.tile_keys)
        visible = distance >= 0
        if self.problem.sliding_window is not None:
            visible &= distance < self.problem.sliding_window
        return jnp.where(visible, scores, _MASKED)

    def softmax(self, scores: jax.Array, maximum: jax.Array, total: jax.Array) -> Any:
        """(new maximum, correction of what was accumulated, new sum, weights) of an online softmax in base 2."""
        factor = self.problem.factor
        new_maximum = jnp.maximum(maximum, scores.max(axis=1) * factor)
        correction = jnp.exp2(maximum - new_maximum)
        weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_maximum, scores.shape, [0]))
        return new_maximum, correction, total * correction + weights.sum(axis=1), weights

    # Output ----------------------------------------------------------------------------------------------------------

    def store(self, item: Item, warpgroup: Any, result: jax.Array) -> None:
        """Writes the rows [skip, stop) of the item's tokens."""
        rows = self.config.segment_rows
        swizzled, plain = (ref.at[warpgroup] for ref in self.o_smem)
        segments = [self.segment(item, warpgroup, s) for s in range(WARPGROUP_ROWS // rows)]
        inside = [(token - item.start >= item.skip) & (token - item.start + rows <= item.stop) for token, _ in segments]
        whole = functools.reduce(lambda a, b: a & b, inside)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(whole)
        def _whole():
            swizzled[...] = result.astype(swizzled.dtype)
            plgpu.commit_smem()
            for s, (token, head) in enumerate(segments):
                target = self.output.at[pl.ds(token, rows), head]
                plgpu.copy_smem_to_gmem(swizzled.at[pl.ds(s * rows, rows)], target)

        @pl.when(~whole)
        def _partial():
            plain[...] = result.astype(plain.dtype)
            plgpu.commit_smem()
            for s, (token, head) in enumerate(segments):
                first = jnp.maximum(item.skip - (token - item.start), 0)
                stop = jnp.minimum(item.stop - (token - item.start), rows)
                self.store_rows(plain, s * rows, first, stop, token, head)

    def store_rows(self, plain: Any, base: int, first: Any, stop: Any, token: Any, head: Any) -> None:
        """Rows [first, stop) of a segment that begins at row `base`, eight at a time and then one at a time."""
        eights = lax.div(jnp.maximum(stop - first, 0), jnp.int32(8))

        def copy(row: Any, count: int) -> None:
            target = self.output.at[pl.ds(token + row, count), head]
            plgpu.copy_smem_to_gmem(plain.at[pl.ds(base + row, count)], target)

        lax.fori_loop(0, eights, lambda i, _: copy(first + i * 8, 8), None)
        lax.fori_loop(first + eights * 8, stop, lambda row, _: copy(row, 1), None)


def _bar(operation: str, barrier_id: int, num_threads: int = 256) -> None:
    """A named barrier of two warpgroups."""

    @plgpu.inline_mgpu()
    def bar_op(ctx: Any) -> None:
        from jax._src.lib.mlir.dialects import llvm
        from jax._src.lib.mlir import ir

        del ctx
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, [], f"bar.{operation} {barrier_id}, {num_threads};", "", has_side_effects=True)

    bar_op()
