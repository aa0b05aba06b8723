"""Sampling truncation for Hopper in Pallas Mosaic GPU: one CTA per row, which is read about once before it is written.

A sample of the row brackets the thresholds; one scan collects the values in the brackets into shared memory and sums up
what lies above them; the exact threshold is found among those candidates. A scan that misses is repeated with what it
taught. Bound by memory: a read, then a read and a write of the row.
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

from pallas_kernels.mosaic import interpret_params
from pallas_kernels.sampling_truncation.cta import MAX_REDUCED, THREADS, VECTOR, Cta
from pallas_kernels.sampling_truncation.histogram import GROUPS, Histogram
from pallas_kernels.sampling_truncation.planning import Options
from pallas_kernels.sampling_truncation.row_scan import Row
from pallas_kernels.sampling_truncation.threshold import Search
from pallas_kernels.tuning import lookup

_SMS = 132
_SHORT = 16384
"""Rows up to this length have too few loads for more than one warpgroup."""
_FILLED = 0.55
"""Share of the pool that a scan is to fill; the fullest thread then still has room."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning parameters."""

    rows: int = 2
    """Rows of a CTA, each with warpgroups of its own. 4 warpgroups in all keep threads at 128 registers."""
    warpgroups: int = 2
    """Of a row; a power of two."""
    loads: int = 6
    """16-byte loads that a thread issues together."""
    samples: int = 32
    """Values of the sample for each thread; a multiple of 8, at most the slots."""
    slots: int = 88
    """Candidates that a thread can hold; a multiple of 4."""

    def __post_init__(self) -> None:
        assert self.warpgroups & (self.warpgroups - 1) == 0 and self.slots % 4 == 0


def default_config(rows: int, vocab: int) -> Config:
    """Without tuning data: two rows share an SM; while there is an SM for each row, a row has all of it."""
    if vocab <= _SHORT:
        return Config(rows=4, warpgroups=1, samples=8, slots=44)
    return Config(rows=1, warpgroups=4, samples=16, slots=44) if rows <= _SMS else Config()


def truncate_logits(
    logits: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    *,
    interpret: bool,
    config: Config | None = None,
) -> jax.Array:
    """See api.truncate_logits; `interpret` runs the kernel on the CPU with race detection."""
    rows, vocab = logits.shape
    if config is None:
        sizes = {"rows": rows, "vocab": vocab}
        config = lookup("truncate_logits", Config, {}, sizes, lambda: default_config(rows, vocab))
    log_min_p = jnp.where(min_p > 0, jnp.log(jnp.maximum(min_p, 1e-38)), -jnp.inf)
    missing = -vocab % THREADS if vocab > VECTOR else VECTOR - vocab
    padded = jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    threads = config.warpgroups * THREADS
    kernel = plgpu.kernel(
        functools.partial(_kernel, config, vocab, interpret),
        out_type=jax.ShapeDtypeStruct(padded.shape, jnp.float32),
        scratch_types={
            "pool": plgpu.SMEM((config.rows, config.slots, threads), jnp.float32),
            "bins": plgpu.SMEM((config.rows, config.warpgroups, GROUPS, threads), jnp.int32),
            "floats": plgpu.SMEM((config.rows, MAX_REDUCED, threads), jnp.float32),
            "integers": plgpu.SMEM((config.rows, MAX_REDUCED, threads), jnp.int32),
            "barriers": plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=3 * config.rows),
        },
        grid=(pl.cdiv(rows, config.rows),),
        grid_names=("cta",),
        num_threads=config.rows * config.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # Threads read only their own columns of the pool, and all else under the CTA's barriers.
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret_params(interpret),
        kernel_name="truncate_logits",
    )
    return kernel(padded, top_k, top_p, log_min_p)[:, :vocab]


def _kernel(
    config: Config,
    vocab: int,
    interpret: bool,
    logits: Any,
    top_k: Any,
    top_p: Any,
    log_min_p: Any,
    output: Any,
    pool: Any,
    bins: Any,
    floats: Any,
    integers: Any,
    barriers: Any,
) -> None:
    """Body of one warpgroup."""
    warpgroup = lax.axis_index("warpgroup")
    team = lax.div(warpgroup, config.warpgroups)
    index = lax.axis_index("cta") * config.rows + team

    @pl.when(index < logits.shape[0])
    def _() -> None:
        partials = {jnp.dtype(jnp.float32): floats.at[team], jnp.dtype(jnp.int32): integers.at[team]}
        written, read, joined = (barriers.at[3 * team + i] for i in range(3))
        own = lax.rem(warpgroup, config.warpgroups)
        cta = Cta(own, config.warpgroups, partials, written, read, joined, interpret)
        row = Row(logits.at[index], cta, config.loads)
        k, p, log_m = top_k[index], top_p[index], log_min_p[index]
        options = Options(k.astype(jnp.float32), p, log_m, (k > 0) & (k < vocab), p < 1.0, log_m > -jnp.inf)
        histogram = Histogram(bins.at[team], cta)
        budget = _FILLED * config.slots * cta.threads
        search = Search(row, pool.at[team], histogram, config.samples, budget)
        cta.start()
        histogram.start()
        needed = options.uses_k | options.uses_p | options.uses_min_p
        lowest = lax.cond(needed, lambda: search.threshold(options), lambda: jnp.float32(-jnp.inf))
        cta.finish()
        row.store_kept(output.at[index], lowest)
