"""Matrix product for Hopper in Pallas Mosaic GPU, for steps of a few hundred tokens.

There cuBLAS cuts a product into so few or so many tiles that a part of the 132 SMs idles. Here the width of a tile is
chosen so that the tiles fill whole rounds of SMs. A CTA computes one tile: a warp brings both operands by TMA, several
steps of K ahead, and two warpgroups multiply 64 rows each.
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

from pallas_kernels.matmul.shapes import ROWS
from pallas_kernels.mosaic import divide_registers, interpret_params
from pallas_kernels.tuning import lookup

WARPGROUPS = 2
WARPGROUP_ROWS = 64
TILE_ROWS = WARPGROUP_ROWS * WARPGROUPS
"""Rows of a CTA."""
TILE_K = 64
"""Of a step: 128 bytes of a row of x, the widest swizzle."""

_SMEM_BYTES = 220 << 10
_OUT_COLUMNS = 64
_MAX_STAGES = 8
_WIDTHS = (64, 96, 128, 192, 256)


@dataclasses.dataclass(frozen=True)
class Config:
    """Columns of a CTA's tile, 0 for XLA's product, and steps of K in flight."""

    columns: int
    stages: int


XLA_PRODUCT = Config(0, 0)


def candidates(rows: int, depth: int, columns: int) -> list[Config]:
    """Configs that fit x [rows, depth] @ w [depth, columns]; XLA's product is the first one."""
    if rows % WARPGROUP_ROWS or depth % TILE_K:
        return [XLA_PRODUCT]
    return [XLA_PRODUCT, *(_config(width) for width in _WIDTHS if columns % width == 0)]


def tuned_config(rows: int, depth: int, columns: int) -> Config | None:
    """The config of the nearest tuned case if it fits; None, and always beyond the tuned rows: XLA's product."""
    if rows > max(ROWS):
        return None
    exact = {"depth": depth, "columns": columns}
    config = lookup("matmul", Config, exact, {"rows": rows}, lambda: XLA_PRODUCT)
    return config if config != XLA_PRODUCT and config in candidates(rows, depth, columns) else None


def _config(columns: int) -> Config:
    """As many stages as shared memory holds."""
    stage = 2 * TILE_K * (TILE_ROWS + columns)
    out = 2 * WARPGROUPS * 2 * 64 * min(columns, _OUT_COLUMNS)
    return Config(columns, min(_MAX_STAGES, (_SMEM_BYTES - out) // stage))


def matmul(x: jax.Array, w: jax.Array, config: Config, *, interpret: bool) -> jax.Array:
    """x [M, K] @ w [K, N] in the dtype of both, summed in float32.

    M is a multiple of WARPGROUP_ROWS, K of TILE_K, N of config.columns.
    """
    (rows, depth), columns = x.shape, w.shape[1]
    assert rows % WARPGROUP_ROWS == depth % TILE_K == columns % config.columns == 0, (x.shape, w.shape, config)

    def swizzled(width: int) -> tuple[Any, ...]:
        swizzle = plgpu.find_swizzle(width * 8 * x.dtype.itemsize)
        tile = (8, swizzle // x.dtype.itemsize)
        return plgpu.TilingTransform(tile), plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]

    out_columns = min(config.columns, _OUT_COLUMNS)
    if config.columns % out_columns:
        out_columns = 32
    scratch = {
        # wgmma wants one swizzle for both.
        "x_smem": plgpu.SMEM(
            (config.stages, WARPGROUPS, WARPGROUP_ROWS, TILE_K), x.dtype, transforms=swizzled(config.columns)
        ),
        "w_smem": plgpu.SMEM((config.stages, TILE_K, config.columns), x.dtype, transforms=swizzled(config.columns)),
        "out_smem": plgpu.SMEM((WARPGROUPS, 2, WARPGROUP_ROWS, out_columns), x.dtype, transforms=swizzled(out_columns)),
        "full": plgpu.Barrier(num_arrivals=WARPGROUPS + 1, num_barriers=config.stages),
        "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=config.stages),
    }
    kernel = plgpu.kernel(
        functools.partial(_kernel, config, out_columns),
        out_type=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        scratch_types=scratch,
        grid=(columns // config.columns, -(-rows // TILE_ROWS)),
        grid_names=("n", "m"),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            unsafe_no_auto_barriers=not interpret,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret_params(interpret),
        kernel_name="matmul",
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
    column = lax.axis_index("n") * config.columns

    def first_row(warpgroup: Any) -> Any:
        """The second half of the last tile may lie behind x: it gets rows that are there, and is not stored."""
        row = lax.axis_index("m") * TILE_ROWS + warpgroup * WARPGROUP_ROWS
        return lax.min(row, jnp.int32(x.shape[0] - WARPGROUP_ROWS))

    def is_inside(warpgroup: Any) -> Any:
        return lax.axis_index("m") * TILE_ROWS + warpgroup * WARPGROUP_ROWS < x.shape[0]

    steps = x.shape[1] // TILE_K
    registers = divide_registers(232, WARPGROUPS, 40)

    def slot_of(step: Any) -> Any:
        return lax.rem(step, jnp.int32(config.stages))

    @pl.when(wg < WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(registers[0], action="increase")

        def product(sums: Any) -> jax.Array:
            def step(k: Any, _: Any) -> None:
                slot = slot_of(k)
                plgpu.barrier_wait(full.at[slot])
                plgpu.wgmma(sums, x_smem.at[slot, wg], w_smem.at[slot])
                plgpu.wgmma_wait(1)
                pl.when(k > 0)(lambda: plgpu.barrier_arrive(free.at[slot_of(k - 1)]))

            lax.fori_loop(0, steps, step, None)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(free.at[slot_of(steps - 1)])
            return sums[...]

        sums = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, config.columns), jnp.float32))
        for i, first in enumerate(range(0, config.columns, out_columns)):
            staged = out_smem.at[wg, i % 2]
            if i > 1:
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            staged[...] = sums[:, first : first + out_columns].astype(staged.dtype)
            plgpu.commit_smem()
            target = out.at[pl.ds(first_row(wg), WARPGROUP_ROWS), pl.ds(column + first, out_columns)]
            pl.when(is_inside(wg))(lambda staged=staged, target=target: plgpu.copy_smem_to_gmem(staged, target))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(wg == WARPGROUPS)
    def _load():
        plgpu.set_max_registers(registers[1], action="decrease")

        @plgpu.warp_map
        def _warp(warp):
            @pl.when(warp == 0)
            def _():
                def step(k: Any, _: Any) -> None:
                    slot = slot_of(k)
                    pl.when(k >= config.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    part = pl.ds(k * TILE_K, TILE_K)
                    for i in range(WARPGROUPS):
                        source = x.at[pl.ds(first_row(i), WARPGROUP_ROWS), part]
                        plgpu.copy_gmem_to_smem(source, x_smem.at[slot, i], full.at[slot])
                    plgpu.copy_gmem_to_smem(w.at[part, pl.ds(column, config.columns)], w_smem.at[slot], full.at[slot])

                lax.fori_loop(0, steps, step, None)
                drain = lambda k, _: plgpu.barrier_wait(free.at[slot_of(k)])  # noqa: E731
                lax.fori_loop(max(steps - config.stages, 0), steps, drain, None)
