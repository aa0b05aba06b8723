"""Cases of matmul and gated_matmul."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pallas_kernels.bench.cases import Checked, Op, Timed, Tuned, normal, relative_error
from pallas_kernels.matmul import reference, xla
from pallas_kernels.matmul.api import gated_matmul, matmul
from pallas_kernels.matmul.shapes import GATED_PRODUCTS, GATED_ROWS, PRODUCTS, ROWS

_OPS = {False: matmul, True: gated_matmul}
_PRODUCTS = {False: PRODUCTS, True: GATED_PRODUCTS}
_ROWS = {False: ROWS, True: GATED_ROWS}


def _arguments(rows: int, depth: int, columns: int, gated: bool, seed: int) -> tuple[jax.Array, ...]:
    return normal((rows, depth), seed=seed), normal((depth, 2, columns) if gated else (depth, columns), seed=seed + 1)


def _timed_case(gated: bool, name: str, rows: int, columns: dict[str, Callable]) -> Timed:
    depth, width = _PRODUCTS[gated][name]
    arguments = functools.partial(_arguments, rows, depth, width, gated)
    halves = 1 + gated
    read, flops = 2 * (rows * depth + halves * depth * width), 2 * halves * rows * depth * width
    return Timed(
        f"{name}, {rows} rows",
        columns,
        arguments,
        read,
        flops=flops,
        ceiling="matmul",
        compiler_options=xla.product_options(rows),
    )


def _timed(gated: bool) -> list[Timed]:
    columns = {name: functools.partial(_OPS[gated], implementation=name) for name in ("mosaic_gpu", "xla")}
    return [_timed_case(gated, name, rows, columns) for name in _PRODUCTS[gated] for rows in _ROWS[gated]]


def _tuned(gated: bool) -> list[Tuned]:
    from pallas_kernels.matmul import mosaic_gpu as kernel

    def timed(name: str, rows: int, config: Any) -> list[Timed]:
        run = xla.gated_matmul if gated else xla.matmul
        if config != kernel.XLA_PRODUCT:
            run = functools.partial(kernel.gated_matmul if gated else kernel.matmul, config=config, interpret=False)
        return [_timed_case(gated, name, rows, {"config": run})]

    return [
        Tuned(
            _OPS[gated].__name__,
            {"depth": depth, "columns": width},
            {"rows": rows},
            kernel.candidates(rows, depth, width, gated=gated),
            functools.partial(timed, name, rows),
        )
        for name, (depth, width) in _PRODUCTS[gated].items()
        for rows in _ROWS[gated]
    ]


def _error(gated: bool, rows: int, depth: int, columns: int, implementation: str) -> float:
    x, w = _arguments(rows, depth, columns, gated, seed=5)
    wanted = (reference.gated_matmul if gated else reference.matmul)(np.asarray(x), np.asarray(w))
    return relative_error(_OPS[gated](x, w, implementation=implementation), wanted)


def _checked(gated: bool) -> list[Checked]:
    product = GATED_PRODUCTS["llama3_8b"] if gated else PRODUCTS["llama3_8b o"]
    shapes = [(rows, *product) for rows in (1, 192, 512)]
    return [Checked("x".join(map(str, s)), functools.partial(_error, gated, *s), 1e-2) for s in shapes]


def _op(gated: bool) -> Op:
    return Op(
        _OPS[gated].__name__,
        functools.partial(_timed, gated),
        functools.partial(_tuned, gated),
        functools.partial(_checked, gated),
    )


MATMUL, GATED_MATMUL = _op(False), _op(True)
