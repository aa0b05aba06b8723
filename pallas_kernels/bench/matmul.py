"""Cases of matmul."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pallas_kernels.bench.cases import Checked, Op, Timed, Tuned, normal, relative_error
from pallas_kernels.matmul import reference, xla
from pallas_kernels.matmul.api import matmul
from pallas_kernels.matmul.shapes import PRODUCTS, ROWS


def _arguments(rows: int, depth: int, width: int, seed: int) -> tuple[jax.Array, ...]:
    return normal((rows, depth), seed=seed), normal((depth, width), seed=seed + 1)


def _timed_case(name: str, rows: int, columns: dict[str, Callable]) -> Timed:
    depth, width = PRODUCTS[name]
    arguments = functools.partial(_arguments, rows, depth, width)
    read = 2 * (rows * depth + depth * width)
    return Timed(f"{name}, {rows} rows", columns, arguments, read, flops=2 * rows * depth * width, ceiling="matmul")


def _timed() -> list[Timed]:
    columns = {name: functools.partial(matmul, implementation=name) for name in ("mosaic_gpu", "xla")}
    return [_timed_case(name, rows, columns) for name in PRODUCTS for rows in ROWS]


def _tuned() -> list[Tuned]:
    from pallas_kernels.matmul import mosaic_gpu as kernel

    def timed(name: str, rows: int, config: Any) -> list[Timed]:
        run = xla.matmul
        if config != kernel.XLA_PRODUCT:
            run = functools.partial(kernel.matmul, config=config, interpret=False)
        return [_timed_case(name, rows, {"config": run})]

    return [
        Tuned(
            "matmul",
            {"depth": PRODUCTS[name][0], "columns": PRODUCTS[name][1]},
            {"rows": rows},
            kernel.candidates(rows, *PRODUCTS[name]),
            functools.partial(timed, name, rows),
        )
        for name in PRODUCTS
        for rows in ROWS
    ]


def _error(rows: int, depth: int, width: int, implementation: str) -> float:
    x, w = _arguments(rows, depth, width, seed=5)
    return relative_error(matmul(x, w, implementation=implementation), reference.matmul(np.asarray(x), np.asarray(w)))


def _checked() -> list[Checked]:
    shapes = [(rows, *PRODUCTS["llama3_8b o"]) for rows in (1, 192, 512)]
    return [Checked("x".join(map(str, shape)), functools.partial(_error, *shape), 1e-2) for shape in shapes]


MATMUL = Op("matmul", _timed, _tuned, _checked)
