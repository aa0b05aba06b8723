"""Matrix products for Hopper in Pallas Mosaic GPU: x @ w, and silu(x @ gate) * (x @ up).

A CTA computes tile after tile of the result, 128 rows high: one warp brings both operands by TMA, several steps of K
ahead and across tiles, and two warpgroups multiply 64 rows each. For up to 64 rows it is one. Tiles are taken so that
those computed at the same time share operands in L2: along the rows first, in groups of at most 16. Two CTAs of a
cluster compute tiles below each other and read the weight once for both.

Where it wins: in small products, where the width of a tile can be chosen so that tiles fill whole rounds of SMs, and in
the gated one, which never writes the two halves to memory.
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

from pallas_kernels.matmul.shapes import GATED_ROWS, ROWS
from pallas_kernels.mosaic import divide_registers, interpret_params
from pallas_kernels.tuning import lookup

WARPGROUP_ROWS = 64
_FEW_ROWS = 8
"""Fewer than WARPGROUP_ROWS are multiples of this: what TMA brings into tiles of shared memory."""
TILE_K = 64
"""Of a step: 128 bytes of a row of x, the widest swizzle."""

_CTAS = 132
_GROUP_ROWS = 16 * 2 * WARPGROUP_ROWS
_SMEM_BYTES = 224 << 10
_OUT_COLUMNS = 64
_MAX_STAGES = {1: 12, 2: 8}
"""By the number of warpgroups."""
_WIDTHS = (64, 96, 128, 192, 256)
_GATED_WIDTHS = (64, 128)


@dataclasses.dataclass(frozen=True)
class Config:
    """Columns of a CTA's tile (of each half of a gated product), 0 for XLA's product; steps of K in flight; CTAs of a
    cluster."""

    columns: int
    stages: int
    cluster: int = 1


XLA_PRODUCT = Config(0, 0)


def candidates(rows: int, depth: int, columns: int, *, gated: bool = False) -> list[Config]:
    """Configs that fit x [rows, depth] and a result of `columns`; XLA's product is the first one."""
    if rows % (WARPGROUP_ROWS if rows > WARPGROUP_ROWS else _FEW_ROWS) or depth % TILE_K:
        return [XLA_PRODUCT]
    warpgroups = _warpgroups(rows)
    widths = [width for width in (_GATED_WIDTHS if gated else _WIDTHS) if columns % width == 0]
    configs = [_config(width, 1 + gated, cluster, warpgroups) for width in widths for cluster in (1, 2)]
    # A cluster needs two tiles below each other; narrow ones read little of the weight.
    return [XLA_PRODUCT, *(c for c in configs if c.cluster == 1 or (rows > 2 * WARPGROUP_ROWS and c.columns >= 128))]


def tuned_config(rows: int, depth: int, columns: int, *, gated: bool = False) -> Config | None:
    """The config of the nearest tuned case if it fits; None, and always beyond the tuned rows: XLA's product."""
    if rows > max(GATED_ROWS if gated else ROWS):
        return None
    exact = {"depth": depth, "columns": columns}
    config = lookup("gated_matmul" if gated else "matmul", Config, exact, {"rows": rows}, lambda: XLA_PRODUCT)
    fits = config in candidates(rows, depth, columns, gated=gated)
    return config if config != XLA_PRODUCT and fits else None


def _warpgroups(rows: int) -> int:
    """Of a CTA, those that multiply."""
    return 1 if rows <= WARPGROUP_ROWS else 2


def _config(columns: int, halves: int, cluster: int, warpgroups: int) -> Config:
    """As many stages as shared memory holds."""
    stage = 2 * TILE_K * (warpgroups * WARPGROUP_ROWS + halves * columns)
    out = 2 * warpgroups * 2 * WARPGROUP_ROWS * min(columns, _OUT_COLUMNS)
    return Config(columns, min(_MAX_STAGES[warpgroups], (_SMEM_BYTES - out) // stage), cluster)


def matmul(x: jax.Array, w: jax.Array, config: Config, *, interpret: bool) -> jax.Array:
    """x [M, K] @ w [K, N] in the dtype of both, summed in float32.

    M is a multiple of WARPGROUP_ROWS or a smaller one of 8, K of TILE_K, N of config.columns.
    """
    return _product(x, w[:, None], config, interpret=interpret)


def gated_matmul(x: jax.Array, w: jax.Array, config: Config, *, interpret: bool) -> jax.Array:
    """silu(x @ w[:, 0]) * (x @ w[:, 1]) of x [M, K] and w [K, 2, N], rounded once; sizes as for `matmul`."""
    assert w.shape[1] == 2, w.shape
    return _product(x, w, config, interpret=interpret)


def _product(x: jax.Array, w: jax.Array, config: Config, *, interpret: bool) -> jax.Array:
    (rows, depth), (_, halves, columns) = x.shape, w.shape
    unit = WARPGROUP_ROWS if rows > WARPGROUP_ROWS else _FEW_ROWS
    assert rows % unit == depth % TILE_K == columns % config.columns == 0, (x.shape, w.shape, config)
    warpgroups = _warpgroups(rows)

    def swizzled(width: int) -> tuple[Any, ...]:
        swizzle = plgpu.find_swizzle(width * 8 * x.dtype.itemsize)
        tile = (8, swizzle // x.dtype.itemsize)
        return plgpu.TilingTransform(tile), plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]

    out_columns = min(config.columns, _OUT_COLUMNS)
    if config.columns % out_columns:
        out_columns = 32
    if config.cluster > 1:
        free = plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=warpgroups, num_barriers=config.stages)
    else:
        free = plgpu.Barrier(num_arrivals=warpgroups, num_barriers=config.stages)
    scratch = {
        # wgmma wants one swizzle for both.
        "x_smem": plgpu.SMEM(
            (config.stages, warpgroups, WARPGROUP_ROWS, TILE_K), x.dtype, transforms=swizzled(config.columns)
        ),
        "w_smem": plgpu.SMEM(
            (config.stages, halves, TILE_K, config.columns), x.dtype, transforms=swizzled(config.columns)
        ),
        "out_smem": plgpu.SMEM((warpgroups, 2, WARPGROUP_ROWS, out_columns), x.dtype, transforms=swizzled(out_columns)),
        "full": plgpu.Barrier(num_arrivals=warpgroups + halves, num_barriers=config.stages),
        "free": free,
    }
    tiles = -(-rows // (warpgroups * WARPGROUP_ROWS * config.cluster)) * (columns // config.columns)
    kernel = plgpu.kernel(
        functools.partial(_kernel, config, out_columns),
        out_type=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        scratch_types=scratch,
        grid=(min(_CTAS // config.cluster, tiles),),
        grid_names=("tile",),
        cluster=(config.cluster,),
        cluster_names=("cluster",),
        num_threads=warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            unsafe_no_auto_barriers=not interpret,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret_params(interpret),
        kernel_name="gated_matmul" if halves == 2 else "matmul",
    )
    return kernel(x, w)


def _kernel(
    config: Config,
    out_columns: int,
    x: Any,
    w: Any,
    out: Any,
    *,
    x_smem: Any,
    w_smem: Any,
    out_smem: Any,
    full: Any,
    free: Any,
) -> None:
    wg = lax.axis_index("wg")
    halves = w.shape[1]
    steps = x.shape[1] // TILE_K
    warpgroups = _warpgroups(x.shape[0])
    tile_rows = warpgroups * WARPGROUP_ROWS
    #: Of a warpgroup; where they are fewer than it multiplies, the others hold anything and are not stored.
    used_rows = min(x.shape[0], WARPGROUP_ROWS)
    registers = divide_registers(232, warpgroups, 40)
    # A unit is what a cluster computes at a time.
    height = tile_rows * config.cluster
    down, across = -(-x.shape[0] // height), w.shape[2] // config.columns
    group = _GROUP_ROWS // height
    first, stride = lax.axis_index("tile"), lax.axis_size("tile")
    count = lax.div(jnp.int32(down * across + stride - 1) - first, jnp.int32(stride))

    def corner(i: Any) -> tuple[Any, Any]:
        """Row and column of the tile that this CTA computes in round i."""
        unit = first + i * stride
        above = lax.div(unit, jnp.int32(group * across)) * group
        high = lax.min(jnp.int32(down) - above, jnp.int32(group))
        inside = unit - above * across
        row = (above + lax.rem(inside, high)) * height + lax.axis_index("cluster") * tile_rows
        return row, lax.div(inside, high) * config.columns

    def rows_of(row: Any, warpgroup: Any) -> Any:
        """Rows behind the end of x are computed from rows that are there, and not stored."""
        start = lax.min(row + warpgroup * WARPGROUP_ROWS, jnp.int32(x.shape[0] - used_rows))
        return pl.ds(start, used_rows)

    def slot_of(step: Any) -> Any:
        return lax.rem(step, jnp.int32(config.stages))

    @pl.when(wg < warpgroups)
    def _compute():
        plgpu.set_max_registers(registers[0], action="increase")

        def tile(i: Any, _: Any) -> None:
            row, column = corner(i)
            begin = i * steps

            def accumulate(*sums: Any) -> Any:
                def step(k: Any, _: Any) -> None:
                    slot = slot_of(begin + k)
                    plgpu.barrier_wait(full.at[slot])
                    for half in range(halves):
                        plgpu.wgmma(sums[half], x_smem.at[slot, wg], w_smem.at[slot, half])
                    plgpu.wgmma_wait(halves)
                    pl.when(k > 0)(lambda: plgpu.barrier_arrive(free.at[slot_of(begin + k - 1)]))

                lax.fori_loop(0, steps, step, None)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[slot_of(begin + steps - 1)])
                return tuple(part[...] for part in sums)

            accumulator = plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, config.columns), jnp.float32)
            sums = pl.run_scoped(accumulate, *[accumulator] * halves)
            parts = config.columns // out_columns
            for n, start in enumerate(range(0, config.columns, out_columns)):
                # Alternating across tiles too: only the copy before the last one is known to have been read.
                staged = out_smem.at[wg, n % 2 if parts % 2 == 0 else lax.rem(i * parts + n, jnp.int32(2))]
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                part = [values[:, start : start + out_columns] for values in sums]
                value = part[0] if halves == 1 else part[0] * part[1] / (1 + jnp.exp(-part[0]))
                staged[...] = value.astype(staged.dtype)
                plgpu.commit_smem()
                target = out.at[rows_of(row, wg), pl.ds(column + start, out_columns)]
                is_inside = row + wg * WARPGROUP_ROWS < x.shape[0]
                source = staged.at[pl.ds(0, used_rows)]
                pl.when(is_inside)(lambda source=source, target=target: plgpu.copy_smem_to_gmem(source, target))

        lax.fori_loop(0, count, tile, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(wg == warpgroups)
    def _load():
        plgpu.set_max_registers(registers[1], action="decrease")

        @plgpu.warp_map
        def _warp(warp):
            @pl.when(warp == 0)
            def _():
                def tile(i: Any, _: Any) -> None:
                    row, column = corner(i)

                    def step(k: Any, _: Any) -> None:
                        number = i * steps + k
                        slot = slot_of(number)
                        pl.when(number >= config.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                        part = pl.ds(k * TILE_K, TILE_K)
                        for warpgroup in range(warpgroups):
                            source = x.at[rows_of(row, warpgroup), part]
                            target = x_smem.at[slot, warpgroup, pl.ds(0, used_rows)]
                            plgpu.copy_gmem_to_smem(source, target, full.at[slot])
                        shared = "cluster" if config.cluster > 1 else None
                        for half in range(halves):
                            source = w.at[part, half, pl.ds(column, config.columns)]
                            plgpu.copy_gmem_to_smem(
                                source, w_smem.at[slot, half], full.at[slot], collective_axes=shared
                            )

                    lax.fori_loop(0, steps, step, None)

                lax.fori_loop(0, count, tile, None)
                # A CTA stays until the other one of its cluster reads and writes nothing of it any more.
                last = count * steps
                drain = lambda k, _: plgpu.barrier_wait(free.at[slot_of(k)])  # noqa: E731
                lax.fori_loop(lax.max(last - config.stages, jnp.int32(0)), last, drain, None)
