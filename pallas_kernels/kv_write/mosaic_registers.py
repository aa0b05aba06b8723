"""KV write for Hopper in Pallas Mosaic GPU: a token's heads travel through registers.

A decode step writes a few KB, so the launch and one trip to memory are all it costs: the slot, the key and the value
are loaded at once, and the stores are not waited for. A TMA would add its descriptor, a barrier and a second trip.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.kv_write.head_rows import HeadRows, head_rows
from pallas_kernels.mosaic import interpret_params, load
from pallas_kernels.tuning import lookup


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning parameters."""

    tokens_per_cta: int = 1


def write_kv(
    k_cache: jax.Array,
    v_cache: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    *,
    interpret: bool,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See api.write_kv; `interpret` runs the kernel on the CPU with race detection."""
    num_tokens, num_kv_heads, head_dim = k.shape
    if config is None:
        exact = {"num_kv_heads": num_kv_heads, "head_dim": head_dim}
        config = lookup("write_kv", Config, exact, {"num_tokens": num_tokens}, Config)
    tokens = min(config.tokens_per_cta, num_tokens)
    kernel = plgpu.kernel(
        functools.partial(_kernel, head_rows(num_kv_heads, head_dim), tokens),
        out_type=(),
        grid=(-(-num_tokens // tokens),),
        grid_names=("tokens",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret_params(interpret),
        kernel_name="write_kv",
    )
    k_ref, v_ref = jax.new_ref(k_cache), jax.new_ref(v_cache)
    kernel(slots, k.astype(k_cache.dtype), v.astype(v_cache.dtype), k_ref, v_ref)
    return jax.freeze(k_ref), jax.freeze(v_ref)


def _kernel(tile: HeadRows, tokens: int, slots: Any, k: Any, v: Any, k_cache: Any, v_cache: Any) -> None:
    """Body of one CTA: all loads, then the stores of the tokens that have a slot."""
    num_tokens, heads, _ = k.shape
    block_size = k_cache.shape[2]
    first = lax.axis_index("tokens") * tokens
    loaded = []
    for j in range(tokens):
        token = lax.min(first + j, num_tokens - 1)
        windows = [pl.ds(start, tile.rows) for start in tile.windows(heads)]
        values = [(load(k.at[token, w], tile.layout), load(v.at[token, w], tile.layout)) for w in windows]
        loaded.append((slots[token], windows, values))
    for j, (slot, windows, values) in enumerate(loaded):

        @pl.when((first + j < num_tokens) & (slot >= 0))
        def _(slot=slot, windows=windows, values=values):
            block, offset = lax.div(slot, block_size), lax.rem(slot, block_size)
            for window, (key, value) in zip(windows, values, strict=True):
                k_cache[block, window, offset] = key
                v_cache[block, window, offset] = value
