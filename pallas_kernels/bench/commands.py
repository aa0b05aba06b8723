"""The commands bench, tune and check: each goes through an op's cases and prints a line for every result."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from pallas_kernels import tuning
from pallas_kernels.bench import attention, kv, matmul, mixed, norm, truncation
from pallas_kernels.bench.cases import Op, Timed
from pallas_kernels.bench.timing import (
    Ceilings,
    chained_device_seconds,
    cupti_available,
    device_seconds,
    measure_ceilings,
    rotations,
    wall_seconds,
)

_COMPILE_THREADS = 8

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        attention.DECODE_ATTENTION,
        attention.PREFILL_ATTENTION,
        mixed.MIXED_ATTENTION,
        kv.WRITE_KV,
        kv.ROPE_WRITE_KV,
        norm.ADD_RMS_NORM,
        matmul.MATMUL,
        matmul.GATED_MATMUL,
        truncation.TRUNCATE_LOGITS,
    )
}


def bench(op: Op, only: str, emit: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Times every case whose name holds `only`. Returns one record for each figure."""
    ceilings = measure_ceilings(_seconds)
    emit(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {_clock()}: {ceilings}")
    records = []
    for case in op.timed():
        if only not in case.name:
            continue
        results = {
            column: _attempt(lambda f=function, c=case: _time(c, f)) for column, function in case.columns.items()
        }
        dense = attention.torch_seconds(case)
        if dense is not None:
            results["torch, dense"] = dense
        for column, seconds in results.items():
            emit(f"{op.name} {case.name}: {column}: {_figure(case, seconds, ceilings)}")
            if isinstance(seconds, float):
                records.append({"op": op.name, "case": case.name, "column": column, "us": seconds * 1e6})
    return records


def tune(op: Op, only: str, emit: Callable[[str], None] = print) -> None:
    """Times every candidate config of every tunable case and stores the best one for this device kind."""
    kind = tuning.device_kind()
    cases = op.tuned()
    if kind is None or not cases:
        emit(f"{op.name}: nothing to tune" + (" without a GPU" if kind is None else ""))
        return
    for case in cases:
        title = f"{case.kernel} {json.dumps({**case.exact, **case.sizes})}"
        if only not in title:
            continue
        found = []
        configs = list(dict.fromkeys(case.candidates))
        timed = [case.timed(config) for config in configs]
        columns = [_times(list(cases)) for cases in zip(*timed, strict=True)]
        for config, times in zip(configs, zip(*columns, strict=True), strict=True):
            failure = next((text for text in times if isinstance(text, str)), None)
            emit(f"{title}: {config}: {failure or ', '.join(f'{seconds * 1e6:.2f} us' for seconds in times)}")
            if failure is None:
                found.append((statistics.geometric_mean(times), len(found), config))
        if found:
            seconds, _, config = min(found)
            entry = tuning.Entry(case.exact, case.sizes, dataclasses.asdict(config), round(seconds * 1e6, 2))
            emit(f"{title}: best {config}, stored in {tuning.record(case.kernel, entry, kind=kind)}")


def check(op: Op, only: str, implementations: list[str], emit: Callable[[str], None] = print) -> int:
    """Runs the correctness cases and prints their largest relative errors. Returns how many are too large."""
    failures = 0
    for case in op.checked():
        if only not in case.name:
            continue
        for implementation in implementations:
            error = _attempt(lambda c=case, i=implementation: float(c.error(i)))
            good = isinstance(error, float) and error <= case.allowed
            failures += not good
            shown = error if isinstance(error, str) else f"{error:.2e}"
            emit(f"{op.name} {case.name}: {implementation}: {shown} of {case.allowed:g} {'ok' if good else 'FAILED'}")
    return failures


def _clock() -> str:
    return "device time" if cupti_available() else "wall time of single calls (no CUPTI)"


def _seconds(function: Callable, inputs: list[tuple], kernels: Sequence[str] = ("",)) -> float:
    return device_seconds(function, inputs, kernels=kernels) if cupti_available() else wall_seconds(function, inputs)


def _time(case: Timed, function: Callable, inputs: list[tuple] | None = None) -> float:
    inputs = inputs or _inputs(case)
    if case.state is None:
        return _seconds(function if _is_compiled(function) else _compiled(case, function, inputs), inputs, case.kernels)
    return chained_device_seconds(function, case.state(), inputs[0])


def _is_compiled(function: Callable) -> bool:
    return isinstance(function, jax.stages.Compiled)


def _compiled(case: Timed, function: Callable, inputs: list[tuple]) -> Callable:
    return jax.jit(function).lower(*inputs[0]).compile(compiler_options=dict(case.compiler_options))


def _inputs(case: Timed) -> list[tuple]:
    return [case.arguments(seed) for seed in range(rotations(case.read_bytes) if case.state is None else 1)]


def _times(candidates: list[Timed]) -> list[float | str]:
    """Of the column "config" of cases that differ in nothing else; compiled at the same time, run one by one."""
    inputs = _inputs(candidates[0])
    functions = [case.columns["config"] for case in candidates]
    with ThreadPoolExecutor(_COMPILE_THREADS) as pool:
        if candidates[0].state is None:  # a chain is compiled where it is timed
            functions = list(
                pool.map(lambda c: _attempt(lambda: _compiled(c, c.columns["config"], inputs)), candidates)
            )
    return [
        function if isinstance(function, str) else _attempt(lambda c=case, f=function: _time(c, f, inputs))
        for case, function in zip(candidates, functions, strict=True)
    ]


def _attempt(run: Callable[[], Any]) -> Any:
    """The result, or what went wrong as text: one case must not cost the others."""
    try:
        return run()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


def _figure(case: Timed, seconds: float | str, ceilings: Ceilings) -> str:
    if isinstance(seconds, str):
        return seconds
    text = f"{seconds * 1e6:.2f} us"
    for amount, unit in ((case.bytes_moved, "TB/s"), (case.flops, "TFLOP/s")):
        if amount is not None:
            rate, ceiling = amount / seconds, getattr(ceilings, case.ceiling)
            text += f", {rate / 1e12:.3g} {unit} ({100 * rate / ceiling:.0f}% of {case.ceiling})"
    return text
