"""Cases of add_rms_norm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pallas_kernels.add_rms_norm import reference
from pallas_kernels.add_rms_norm.api import add_rms_norm
from pallas_kernels.add_rms_norm.shapes import HIDDEN, NUM_TOKENS
from pallas_kernels.bench.cases import Checked, Op, Timed, Tuned, normal, relative_error

_IMPLEMENTATIONS = ("mosaic_gpu", "xla")
_MODELS = ("llama3_1b", "qwen3_4b", "llama3_3b", "llama3_8b", "qwen3_14b", "llama3_70b")
_EPS = 1e-5


def _arguments(num_tokens: int, size: int, dtype: str, seed: int) -> tuple[jax.Array, ...]:
    x, delta = (normal((num_tokens, size), dtype, seed + i) for i in range(2))
    return x, delta, normal((size,), dtype, seed + 2)


def _timed_case(model: str, num_tokens: int, columns: dict[str, Callable]) -> Timed:
    size = HIDDEN[model]
    arguments = functools.partial(_arguments, num_tokens, size, "bfloat16")
    read = 4 * num_tokens * size
    return Timed(f"{model} {size}, {num_tokens} tokens", columns, arguments, read, bytes_moved=2 * read)


def _timed() -> list[Timed]:
    columns = {name: functools.partial(add_rms_norm, eps=_EPS, implementation=name) for name in _IMPLEMENTATIONS}
    return [_timed_case(model, num_tokens, columns) for model in _MODELS for num_tokens in NUM_TOKENS]


def _tuned() -> list[Tuned]:
    from pallas_kernels.add_rms_norm import mosaic_gpu as kernel

    def timed(model: str, num_tokens: int, config: Any) -> list[Timed]:
        run = functools.partial(kernel.add_rms_norm, eps=_EPS, interpret=False, config=config)
        return [_timed_case(model, num_tokens, {"config": run})]

    return [
        Tuned(
            "add_rms_norm",
            {"size": HIDDEN[model], "itemsize": 2},
            {"num_tokens": num_tokens},
            [kernel.default_config(num_tokens, HIDDEN[model]), *kernel.configs(HIDDEN[model])],
            functools.partial(timed, model, num_tokens),
        )
        for model in _MODELS
        for num_tokens in NUM_TOKENS
    ]


def _error(size: int, num_tokens: int, dtype: str, implementation: str) -> float:
    """Of the norm; infinite when the sum is not exact."""
    arguments = _arguments(num_tokens, size, dtype, seed=5)
    total, normed = add_rms_norm(*arguments, eps=_EPS, implementation=implementation)
    wanted_total, wanted = reference.add_rms_norm(*map(np.asarray, arguments), eps=_EPS)
    if not np.array_equal(np.asarray(total), wanted_total):
        return float("inf")
    return relative_error(normed, wanted)


def _checked() -> list[Checked]:
    # A 16-bit result may be rounded the other way: one unit in the last place, of the row's largest value at most eps.
    allowed = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 1e-6}
    return [
        Checked(f"{size}, {num_tokens} tokens, {dtype}", functools.partial(_error, size, num_tokens, dtype), error)
        for size in (*HIDDEN.values(), 72)
        for num_tokens in (1, 67, 1025)
        for dtype, error in allowed.items()
    ]


ADD_RMS_NORM = Op("add_rms_norm", _timed, _tuned, _checked)
