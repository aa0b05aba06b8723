"""Tiles of an fp8 cache as the f16 tiles that wgmma takes: through registers, from shared memory to shared memory.

Every e4m3 number is an f16 number, so nothing is rounded. A thread takes 16 bytes at a time and leaves 32. In every
group of 8 threads, whose 16-byte accesses go together, the chunks that are read and those that are written lie in
different banks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

CHUNK = 16
"""Elements that a thread converts at a time."""

TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
_SCALAR = plgpu.Layout.WG_SPLAT(())
_BATCH = 4


@dataclasses.dataclass(frozen=True)
class Keys:
    """Which rows of a tile are kept: those of the keys [first, stop), traced, counted from the tile's first key.

    A tile is boxes of box_rows rows, in which `cell` keys follow each other for each head. Both are powers of two.
    """

    first: Any
    stop: Any
    box_rows: int
    cell: int


class _Int:
    """An i32 of the kernel with Python's operators, so that `place` serves the kernel and its test."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def _with(self, operation: Any, other: _Int | int) -> _Int:
        right = other.value if isinstance(other, _Int) else utils.c(other, ir.IntegerType.get_signless(32))
        return _Int(operation(self.value, right))

    def __add__(self, other: _Int | int) -> _Int:
        return self._with(arith.addi, other)

    def __mul__(self, other: _Int | int) -> _Int:
        return self._with(arith.muli, other)

    def __and__(self, other: _Int | int) -> _Int:
        return self._with(arith.andi, other)

    def __xor__(self, other: _Int | int) -> _Int:
        return self._with(arith.xori, other)

    def __rshift__(self, other: int) -> _Int:
        return self._with(arith.shrui, other)


def place(thread: Any, head_dim: int) -> tuple[Any, Any, Any]:
    """Row of a thread's first chunk, byte offset of it in the e4m3 tile, and of its first half in the f16 tile.

    The e4m3 tile is [rows, head_dim], rows one after the other; the f16 tile is tiled (8, 64) and swizzled over 128
    bytes, 1 KB aligned: the second half is at the first one's address ^ 16. `offsets` has the other chunks' distances.

    Args:
        thread: Number in the warpgroup: an int, an integer array or an _Int.
        head_dim: 64, 128 or 256.
    """
    lane, warp = thread & 31, (thread >> 5) & 3
    if head_dim == 64:  # 8 threads take two rows
        row, chunk = warp * 8 + (lane >> 2), lane & 3
    else:  # 8 threads take half of 128 bytes of a row and the other half of the next
        row = warp * 4 + (lane >> 4) * 2 + (((lane >> 2) ^ (lane >> 3)) & 1)
        chunk = lane & 7
    line = row & 7
    tile = (row >> 3) * (head_dim // 64) + (chunk >> 2)
    first = tile * 1024 + line * 128 + (((chunk & 3) * 2) ^ line) * 16
    return row, row * head_dim + chunk * CHUNK, first


def offsets(rows: int, head_dim: int) -> Iterator[tuple[int, int, int]]:
    """(rows, bytes in the e4m3 tile, bytes in the f16 tile) from each chunk of a thread to its first one."""
    step = 32 if head_dim == 64 else 16
    for row in range(0, rows, step):
        for column in range(0, head_dim, 128):
            yield row, row * head_dim + column, row * head_dim * 2 + column // 64 * 1024


def convert(source: Any, target: Any, *, keys: Keys | None = None, interpret: bool) -> None:
    """Writes the e4m3 tile `source` to the f16 tile `target`, both refs of [rows, D] in shared memory.

    By one warpgroup. `target` has TRANSFORMS, `source` none. What reads `target` by wgmma needs a commit_smem first.
    Rows that are not kept become zeros, whatever they hold; without `keys` all are kept.
    """
    if interpret:
        values = source[...].astype(jnp.float16)
        if keys is not None:
            row = lax.broadcasted_iota(jnp.int32, values.shape, 0)
            key = row // keys.box_rows * keys.cell + lax.rem(row, jnp.int32(keys.cell))
            values = jnp.where((key >= keys.first) & (key < keys.stop), values, jnp.zeros_like(values))
        target[...] = values
        return
    rows, head_dim = source.shape

    limits = () if keys is None else (keys.first, keys.stop - keys.first)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(()), plgpu.RefType(TRANSFORMS), *(_SCALAR for _ in limits)))
    def through_registers(ctx: Any, source: Any, target: Any, *limits: Any) -> None:
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        thread = utils.thread_idx()
        bases = [llvm.ptrtoint(i32, utils.memref_ptr(ref)) for ref in (source, target)]
        row, *places = place(_Int(thread), head_dim)
        operands = [(offset + _Int(base)).value for base, offset in zip(bases, places, strict=True)]
        if limits:
            operands += [row.value, *(limit.registers.item() for limit in limits)]
        constraints = ",".join(["r"] * len(operands))
        chunks = list(offsets(rows, head_dim))
        for start in range(0, len(chunks), _BATCH):
            text = _program(chunks[start : start + _BATCH], keys)
            void = ir.Type.parse("!llvm.void")
            llvm.inline_asm(void, operands, text, constraints, has_side_effects=True)

    through_registers(source, target, *limits)  # pyright: ignore[reportCallIssue]


def _program(chunks: list[tuple[int, int, int]], keys: Keys | None) -> str:
    """PTX that loads chunks from $0, converts them and stores their halves to $1 and $1 ^ 16.

    With keys, $2 is the row of the thread's first chunk, $3 the first key that is kept and $4 their number.
    """
    count = 4 * len(chunks)
    lines = [f".reg .b32 w<{count}>; .reg .b16 low, high; .reg .b32 h<8>, other; .reg .b32 row, box, key;"]
    lines.append(".reg .pred kept; xor.b32 other, $1, 16;")
    words = [[f"w{4 * index + i}" for i in range(4)] for index in range(len(chunks))]
    for (_, offset, _), group in zip(chunks, words, strict=True):
        lines.append(f"ld.shared.v4.b32 {{{', '.join(group)}}}, [$0 + {offset}];")
    for (row, _, offset), group in zip(chunks, words, strict=True):
        if keys is not None:
            lines.append(f"add.u32 row, $2, {row}; shr.u32 box, row, {keys.box_rows.bit_length() - 1};")
            lines.append(f"and.b32 key, row, {keys.cell - 1}; mad.lo.u32 key, box, {keys.cell}, key;")
            lines.append("sub.s32 key, key, $3; setp.lt.u32 kept, key, $4;")
            lines.extend(f"selp.b32 {word}, {word}, 0, kept;" for word in group)
        for i, word in enumerate(group):
            lines.append(f"mov.b32 {{low, high}}, {word};")
            lines.append(f"cvt.rn.f16x2.e4m3x2 h{2 * i}, low;")
            lines.append(f"cvt.rn.f16x2.e4m3x2 h{2 * i + 1}, high;")
        lines.append(f"st.shared.v4.b32 [$1 + {offset}], {{h0, h1, h2, h3}};")
        lines.append(f"st.shared.v4.b32 [other + {offset}], {{h4, h5, h6, h7}};")
    return "{ " + " ".join(lines) + " }"
