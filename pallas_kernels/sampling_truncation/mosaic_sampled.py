"""Sampling truncation for Hopper in Pallas Mosaic GPU: one CTA per row, which is read about once before it is written.

A sample of the row brackets the threshold; one scan collects the values in the bracket into shared memory and sums up
what lies above it; the exact threshold is found among those candidates. A scan that misses is repeated with what it
taught. Bound by memory: one scan (top-p with a wide nucleus: two), then a read and a write of the row.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import interpret_params
from pallas_kernels.sampling_truncation.cta import MAX_REDUCED, THREADS, VECTOR, Cta
from pallas_kernels.sampling_truncation.row_scan import Row
from pallas_kernels.sampling_truncation.threshold import Options, Search
from pallas_kernels.tuning import lookup


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning parameters."""

    warpgroups: int = 4
    """Of the CTA of a row; a power of two."""
    loads: int = 3
    """16-byte loads that a thread issues together."""
    samples: int = 8
    """Values of the sample per thread; a multiple of 4."""
    slots: int = 24
    """Candidates that a thread can hold; a multiple of 4."""
    ahead: bool = True
    """Whether a scan loads the next tile before it works on one."""
    auto_barriers: bool = False
    """Mosaic's own barriers around shared memory, in addition to those of the CTA."""

    def __post_init__(self) -> None:
        assert self.warpgroups & (self.warpgroups - 1) == 0 and self.samples % 4 == 0 and self.slots % 4 == 0


def default_config(rows: int) -> Config:
    """Without tuning data: the whole SM for a row while there is one for each."""
    return Config(warpgroups=8, loads=2, samples=4, slots=12) if rows <= 132 else Config()


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
        config = lookup("truncate_logits", Config, {}, sizes, lambda: default_config(rows))
    log_min_p = jnp.where(min_p > 0, jnp.log(jnp.maximum(min_p, 1e-38)), -jnp.inf)
    missing = -vocab % THREADS if vocab > VECTOR else VECTOR - vocab
    padded = jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    columns = config.warpgroups * THREADS
    kernel = plgpu.kernel(
        functools.partial(_kernel, config, vocab, interpret),
        out_type=jax.ShapeDtypeStruct(padded.shape, jnp.float32),
        scratch_types={
            "sample": plgpu.SMEM((config.samples, columns), jnp.float32),
            "candidates": plgpu.SMEM((config.slots, columns), jnp.float32),
            "partials": plgpu.SMEM((MAX_REDUCED, columns), jnp.float32),
            "barriers": plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=2),
        },
        grid=(rows,),
        grid_names=("row",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # Threads read only their own columns of the pools, and the partials under the CTA's barriers.
            unsafe_no_auto_barriers=not config.auto_barriers,
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
    sample: Any,
    candidates: Any,
    partials: Any,
    barriers: Any,
) -> None:
    """Body of one warpgroup of a row's CTA."""
    index = lax.axis_index("row")
    warpgroup = lax.axis_index("warpgroup")
    cta = Cta(warpgroup, config.warpgroups, partials, barriers.at[0], barriers.at[1], interpret)
    row = Row(logits.at[index], cta, config.loads, config.ahead)
    k, p, log_m = top_k[index], top_p[index], log_min_p[index]
    options = Options(k.astype(jnp.float32), p, log_m, (k > 0) & (k < vocab), p < 1.0)
    needed = options.uses_k | options.uses_p | (log_m > -jnp.inf)
    search = Search(row, sample, candidates, wanted_candidates=config.warpgroups * THREADS * config.slots // 3)
    cta.start()
    lowest = lax.cond(needed, lambda: search.threshold(options), lambda: jnp.float32(-jnp.inf))
    cta.finish()
    row.store_kept(output.at[index], lowest)
