"""How one warpgroup holds a token's heads in registers, `[heads, width]` at a time, for the kernels of this folder.

A row is `width` elements of one head. Lanes lie along the row, so that reductions over it stay within a warp; rows go
over the lanes that are left and over the warps. Heads that do not fill the four warps are held by several of them,
which then store the same values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from jax.experimental.mosaic.gpu.fragmented_array import TiledLayout
from jax.experimental.pallas import mosaic_gpu as plgpu

_WARPS = 4
_LANES = 32
_MAX_VECTOR = 8  # 16 bytes of a 16-bit type


@dataclasses.dataclass(frozen=True)
class HeadRows:
    """A register tile of `rows` heads times `width` elements, `vector` neighbours in each lane."""

    rows: int
    width: int
    vector: int
    warps: int

    @property
    def layout(self) -> Any:
        rows_per_warp = self.rows // self.warps
        # Tiled dims of one tile: [warps, 1, rows_per_warp, lanes, 1, vector].
        layout = TiledLayout(
            plgpu.Tiling(((self.rows, self.width), (rows_per_warp, self.width), (1, self.vector))),
            warp_dims=(-6,) if self.warps == _WARPS else (plgpu.Replicated(_WARPS // self.warps), -6),
            lane_dims=(-4, -3),
            vector_dim=-1,
            _check_canonical=False,
        ).canonicalize()
        return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)

    def windows(self, heads: int) -> Iterator[int]:
        """First heads of the tiles that cover `heads` heads; the last two may overlap."""
        for first in range(0, heads, self.rows):
            yield min(first, heads - self.rows)


def head_rows(heads: int, width: int) -> HeadRows:
    """The tile with the widest loads that fits into `heads` rows; without replicas if there is one."""
    options = []
    vector = _MAX_VECTOR
    while vector:
        lanes_per_row = width // vector
        if width % vector == 0 and lanes_per_row <= _LANES:
            for warps in (4, 2, 1):
                rows = warps * (_LANES // lanes_per_row)
                if rows <= heads:
                    options.append((warps == _WARPS, vector, warps, rows))
        vector //= 2
    _, vector, warps, rows = max(options)
    return HeadRows(rows, width, vector, warps)
