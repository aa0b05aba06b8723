"""A compute warpgroup of the prefill kernel: 64 rows of queries.

The key tiles of an item are taken from the last to the first: the masked ones come first. The scores of a key tile and
the product with the values of the tile before it are issued together (FlashAttention-3, Shah et al., arXiv 2407.08608);
the softmax of those scores follows, while the tensor cores work for the other warpgroup.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import over_columns
from pallas_kernels.ragged_paged_attention import mosaic_inline as inline
from pallas_kernels.ragged_paged_attention.mosaic_prefill_common import LOG2E, WARPGROUP_ROWS, Cta, Item
from pallas_kernels.ragged_paged_attention.mosaic_prefill_output import store_rows

_MASKED = -(2.0**100)  # a power of two: its product with a factor is exact, so masked - masked is 0


@dataclasses.dataclass(frozen=True)
class Warpgroup:
    """Compute warpgroup `index` (traced) of a CTA."""

    cta: Cta
    index: Any

    def compute(self) -> None:
        """Runs through the items of the CTA."""
        cta = self.cta

        def one_item(index: Any, used: Any) -> Any:
            item = cta.item(index)
            result = self.attend(item, used)
            # Read again at head dim 256, where its scalars would not fit in registers during the loops.
            store_rows(cta, self.index, cta.item(index) if cta.problem.head_dim > 128 else item, result)
            return used + item.steps

        lax.fori_loop(0, cta.num_items(), one_item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def attend(self, item: Item, used: Any) -> jax.Array:
        """f32[64, D], the output of this warpgroup's rows of an item; `used` key tiles came before it."""
        cta = self.cta
        maximum, total = self.initial(item)
        plgpu.barrier_wait(cta.q_full.at[self.index])
        plgpu.barrier_wait(cta.k_full(cta.slot(used)))
        scores = self.first_scores(item, used)
        maximum, _, total, weights = self.softmax(scores, maximum, total)
        accumulator = jnp.zeros((WARPGROUP_ROWS, cta.problem.head_dim), jnp.float32)
        accumulator = plgpu.layout_cast(accumulator, plgpu.Layout.WGMMA)
        carry = (accumulator, maximum, total, weights.astype(cta.q_smem.dtype))

        step = functools.partial(self.step, item, used)
        begin, end = self.unmasked_steps(item)
        carry = lax.fori_loop(1, begin, functools.partial(step, masked=True), carry)
        carry = lax.fori_loop(begin, end, functools.partial(step, masked=False), carry)
        if cta.problem.sliding_window is not None:
            carry = lax.fori_loop(end, item.steps, functools.partial(step, masked=True), carry)
        accumulator, _, total, weights = carry

        slot = cta.slot(used + item.steps - 1)
        plgpu.barrier_wait(cta.v_full(slot))
        accumulator = self.add_product(accumulator, weights, slot)
        plgpu.barrier_arrive(cta.v_free(slot))
        return accumulator * over_columns(1.0 / total, accumulator.shape)

    def unmasked_steps(self, item: Item) -> tuple[Any, Any]:
        """Steps [a, b) after the first whose key tiles every row of the item sees whole."""
        tile_keys, window = jnp.int32(self.cta.config.tile_keys), self.cta.problem.sliding_window
        whole = lax.div(jnp.maximum(item.position + item.skip + 1, 0), tile_keys)  # tiles that end before the diagonal
        first = jnp.clip(item.last - whole + 1, 1, item.steps)
        if window is None:
            return first, item.steps
        low = jnp.maximum(item.position + item.stop - window, 0)  # where the window of the last row begins
        bottom = item.last - lax.div(low + (tile_keys - 1), tile_keys) + 1
        return first, jnp.clip(bottom, first, item.steps)

    def release(self, item: Item, used: Any, step: Any) -> None:
        """Frees the keys of a step whose scores are computed, and after the last step the queries."""
        plgpu.barrier_arrive(self.cta.k_free(self.cta.slot(used + step)))
        pl.when(step == item.steps - 1)(lambda: plgpu.barrier_arrive(self.cta.q_free.at[self.index]))

    def first_scores(self, item: Item, used: Any) -> jax.Array:
        q, k = self.cta.q_smem.at[self.index], self.cta.k_smem.at[self.cta.slot(used)]

        def product(reference: Any) -> jax.Array:
            plgpu.wgmma(reference, q, k.transpose((1, 0)))
            return reference[...]

        shape = (WARPGROUP_ROWS, self.cta.config.tile_keys)
        scores = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
        self.release(item, used, jnp.int32(0))
        return self.masked(item, 0, self.capped(scores))

    def step(self, item: Item, used: Any, step: Any, carry: Any, *, masked: bool) -> Any:
        """Scores and softmax of the key tile `step`, product with the values of the tile before it."""
        cta = self.cta
        accumulator, maximum, total, weights = carry
        slot, before = cta.slot(used + step), cta.slot(used + step - 1)
        plgpu.barrier_wait(cta.k_full(slot))

        def finish(scores: jax.Array) -> Any:
            self.release(item, used, step)
            scores = self.capped(scores)
            return self.softmax(self.masked(item, step, scores) if masked else scores, maximum, total)

        products = self.interpreted_products if cta.problem.interpret else self.products
        accumulator, done = products(slot, before, accumulator, weights, finish)
        maximum, correction, total, weights = done
        plgpu.barrier_arrive(cta.v_free(before))
        accumulator = accumulator * over_columns(correction, accumulator.shape)
        return accumulator, maximum, total, weights.astype(cta.q_smem.dtype)

    def products(
        self, slot: Any, before: Any, accumulator: jax.Array, weights: jax.Array, finish: Callable[[jax.Array], Any]
    ) -> tuple[jax.Array, Any]:
        """(accumulator + weights @ values of `before`, finish(scores of `slot`)).

        The registers of the weights must not change before the second product is complete. ptxas before CUDA 13.3 is
        known to get that wrong in places, which an exact test on the GPU would show.
        """
        cta = self.cta
        q, k, v = cta.q_smem.at[self.index], cta.k_smem.at[slot], cta.v_smem.at[before]

        def both(score_ref: Any, accumulator_ref: Any) -> Any:
            accumulator_ref[...] = accumulator
            plgpu.wgmma(score_ref, q, k.transpose((1, 0)))
            plgpu.barrier_wait(cta.v_full(before))
            plgpu.wgmma(accumulator_ref, weights, v)
            done = finish(plgpu.wgmma_accumulator_load(score_ref))
            return plgpu.wgmma_accumulator_load(accumulator_ref), done

        shapes = (WARPGROUP_ROWS, cta.config.tile_keys), (WARPGROUP_ROWS, cta.problem.head_dim)
        return pl.run_scoped(both, *(plgpu.WGMMAAccumulatorRef(shape, jnp.float32) for shape in shapes))

    def interpreted_products(
        self, slot: Any, before: Any, accumulator: jax.Array, weights: jax.Array, finish: Callable[[jax.Array], Any]
    ) -> tuple[jax.Array, Any]:
        """The interpreter has no wgmma that accumulates in place; its plain reads need a fence."""
        cta = self.cta
        scores = jnp.dot(cta.q_smem[self.index], cta.k_smem[slot].T, preferred_element_type=jnp.float32)
        plgpu.barrier_wait(cta.v_full(before))
        accumulator = self.add_product(accumulator, weights, before)
        return accumulator, finish(scores)

    def add_product(self, accumulator: jax.Array, weights: jax.Array, slot: Any) -> jax.Array:
        if self.cta.problem.interpret:
            product = jnp.dot(weights, self.cta.v_smem[slot], preferred_element_type=jnp.float32)
            plgpu.commit_smem()
            return accumulator + product
        product = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, self.cta.v_smem.at[slot]))
        return product(plgpu.WGMMAAccumulatorRef.init(accumulator))  # pyright: ignore[reportReturnType]

    def initial(self, item: Item) -> tuple[jax.Array, jax.Array]:
        """Running maximum (base 2) and sum of a row before its first key; a sink is as if it were a key."""
        cta, layout = self.cta, plgpu.Layout.WGMMA.reduce(1)

        def rows(value: float) -> jax.Array:
            return plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), value, jnp.float32), layout)

        if not cta.problem.sinks:
            # Below every masked score, so that a row of padding, which sees nothing, has a sum that is not 0.
            return rows(2 * _MASKED * max(1.0, cta.problem.factor)), rows(0.0)
        maximum = rows(_MASKED)
        row = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=layout)
        for segment in range(cta.config.segments):
            _, head = cta.segment(item, self.index, segment)
            sink = lax.broadcast_in_dim(cta.sinks[head] * LOG2E, (WARPGROUP_ROWS,), [])
            maximum = jnp.where(row >= segment * cta.config.segment_rows, plgpu.layout_cast(sink, layout), maximum)
        return maximum, rows(1.0)

    def capped(self, scores: jax.Array) -> jax.Array:
        cap = self.cta.problem.soft_cap
        return scores if cap is None else jnp.tanh(scores * (self.cta.problem.scale / cap))

    def masked(self, item: Item, step: Any, scores: jax.Array) -> jax.Array:
        """The scores with those of keys that a row must not see replaced."""
        config, window = self.cta.config, self.cta.problem.sliding_window
        row = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
        token = row + self.index * WARPGROUP_ROWS
        if config.heads > 1:
            token = lax.rem(token, jnp.full_like(token, config.tile_tokens))
        stop = token + (item.position + 1 - (item.last - step) * config.tile_keys)
        start = None if window is None else stop - window
        if not self.cta.problem.interpret:
            return inline.keep_columns(scores, start, stop, _MASKED)
        column = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        visible = column < stop[:, None]
        if start is not None:
            visible &= column >= start[:, None]
        return jnp.where(visible, scores, _MASKED)

    def softmax(self, scores: jax.Array, maximum: jax.Array, total: jax.Array) -> Any:
        """(new maximum, correction of what was accumulated, new sum, weights) of an online softmax in base 2."""
        factor = self.cta.problem.factor
        new_maximum = jnp.maximum(maximum, scores.max(axis=1) * factor)
        correction = jnp.exp2(maximum - new_maximum)
        weights = jnp.exp2(scores * factor - over_columns(new_maximum, scores.shape))
        return new_maximum, correction, total * correction + weights.sum(axis=1), weights
