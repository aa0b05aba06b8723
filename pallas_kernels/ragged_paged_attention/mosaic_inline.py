"""What the prefill kernel needs below Pallas: masks and stores of its output that spare registers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

_ROWS = plgpu.Layout.WGMMA.reduce(1)


def _element(register: Any, index: int) -> Any:
    position = ir.DenseI64ArrayAttr.get([index])
    return vector.extract(register, dynamic_position=[], static_position=position)


def keep_columns(scores: jax.Array, start: jax.Array | None, stop: jax.Array, other: float) -> jax.Array:
    """f32[64, N] with `other` outside the columns [start[row], stop[row]) of each row.

    A thread compares the column numbers of its registers, as immediates, with two numbers per row; iota arrays would
    stay in registers throughout the kernel.
    """
    layout = plgpu.Layout.WGMMA
    bounds = (stop,) if start is None else (stop, start)

    @plgpu.inline_mgpu(
        arg_types=(layout, *(_ROWS for _ in bounds)),
        return_type=plgpu.ShapeDtypeStruct(scores.shape, jnp.float32, layout=layout),
    )
    def keep(ctx: Any, scores: Any, *bounds: Any) -> Any:
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        lane_column = arith.muli(arith.remui(utils.thread_idx(), utils.c(4, i32)), utils.c(2, i32))
        limits = [
            [arith.subi(_element(register, 0), lane_column) for register in bound.registers.flat] for bound in bounds
        ]
        fill = utils.c(other, ir.F32Type.get())
        registers = np.empty_like(scores.registers)
        strides = scores.layout.tiling.tile_strides((scores.shape[1], 1))
        for index in np.ndindex(registers.shape):
            row, column = divmod(sum(i * s for i, s in zip(index, strides, strict=True)), scores.shape[1])
            register = scores.registers[index]
            for element in range(2):
                number = utils.c(column + element, i32)
                visible = arith.cmpi(arith.CmpIPredicate.slt, number, limits[0][row // 8])
                if len(limits) == 2:
                    above = arith.cmpi(arith.CmpIPredicate.sge, number, limits[1][row // 8])
                    visible = arith.andi(visible, above)
                kept = arith.select(visible, _element(register, element), fill)
                position = ir.DenseI64ArrayAttr.get([element])
                register = vector.insert(kept, register, dynamic_position=[], static_position=position)
            registers[index] = register
        return type(scores)(_registers=registers, _layout=scores.layout, _is_signed=None)

    return keep(scores, *bounds)


def stage_rows(values: jax.Array, staged: Any, transforms: tuple[Any, ...]) -> None:
    """Writes 16-bit values [64, N] to shared memory tiled (1, 64) and swizzled over 128 bytes, by stmatrix.

    A thread's address comes from one register that the compiler cannot compute ahead of time: otherwise it keeps all
    addresses in registers throughout the kernel.
    """
    tiles = values.shape[1] // 64

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(transforms)))
    def store(ctx: Any, values: Any, staged: Any) -> None:
        del ctx
        i32 = ir.IntegerType.get_signless(32)

        def constant(value: int) -> Any:
            return utils.c(value, i32)

        thread = llvm.inline_asm(i32, [], "mov.u32 $0, %tid.x;", "=r", has_side_effects=True)
        lane = arith.andi(thread, constant(31))  # pyright: ignore[reportArgumentType]
        warp = arith.andi(arith.shrui(thread, constant(5)), constant(3))  # pyright: ignore[reportArgumentType]
        row = arith.addi(arith.muli(warp, constant(16)), arith.andi(lane, constant(15)))
        line = arith.muli(row, constant(tiles))  # lines of 128 bytes: tiles of a row one after the other
        chunk = arith.xori(arith.andi(line, constant(7)), arith.shrui(lane, constant(4)))
        base = llvm.ptrtoint(i32, utils.memref_ptr(staged))
        start = arith.addi(base, arith.muli(line, constant(128)))
        swizzled = arith.muli(chunk, constant(16))
        registers = values.registers.reshape(values.shape[1] // 8, 2)
        pair = ir.VectorType.get((1,), i32)
        for index in range(0, registers.shape[0], 2):
            tile, part = divmod(index, 8)
            words = [_element(vector.bitcast(pair, register), 0) for register in registers[index : index + 2].flat]
            offset = arith.xori(swizzled, constant((part ^ tile) * 16))
            address = arith.addi(arith.addi(start, offset), constant(tile * 128))
            text = "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};"
            void = ir.Type.parse("!llvm.void")
            llvm.inline_asm(void, [address, *words], text, "r,r,r,r,r", has_side_effects=True)

    store(values, staged)  # pyright: ignore[reportCallIssue]
