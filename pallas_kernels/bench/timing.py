"""Device time of compiled JAX functions, and the ceilings of the device.

Device time comes from CUPTI, which sees each kernel, also those of a command buffer. A process can have one CUPTI
subscriber: not together with jax.profiler, Nsight or compute-sanitizer.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_L2_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel launch as CUPTI saw it."""

    name: str
    seconds: float


def _extension() -> Any:
    """The CUPTI bindings of Mosaic GPU; they exist where the CUDA plugin is installed."""
    from jax._src.lib import mosaic_gpu

    return mosaic_gpu._mosaic_gpu_ext  # pyright: ignore


def cupti_available() -> bool:
    """Whether device times can be taken."""
    try:
        _extension()
    except (ImportError, AttributeError):
        return False
    return jax.default_backend() == "gpu"


def launches(run: Callable[[], Any]) -> list[Kernel]:
    """The kernels that `run` launches, in order; `run` must have been compiled before.

    CUPTI stays attached to the process (finalising it has made later launches fail).
    """
    extension = _extension()
    extension._cupti_init()
    try:
        jax.block_until_ready(run())
    finally:
        timings = extension._cupti_get_timings(False)
    return [Kernel(name, milliseconds / 1e3) for name, milliseconds in timings]


def device_seconds(
    function: Callable, inputs: Sequence[Sequence[Any]], iterations: int = 10, kernels: Sequence[str] = ("",)
) -> float:
    """Median device time of `function(*arguments)`, its kernels together, with `inputs` taken in turns.

    Args:
        function: Compiled or jitted; must not donate.
        inputs: One or more sets of arguments; several of them keep the L2 from answering, see `rotations`.
        iterations: Calls that are timed.
        kernels: Parts of the names of the kernels that count; default: all kernels.
    """
    for arguments in inputs:
        jax.block_until_ready(function(*arguments))
    times = []
    for i in range(iterations):
        arguments = inputs[i % len(inputs)]
        launched = launches(lambda a=arguments: function(*a))
        times.append(sum(kernel.seconds for kernel in launched if any(part in kernel.name for part in kernels)))
    return statistics.median(times)


def wall_seconds(function: Callable, inputs: Sequence[Sequence[Any]], iterations: int = 10) -> float:
    """Best wall time of one call, dispatch included: what is left where CUPTI is missing."""
    best = float("inf")
    for i in range(iterations + len(inputs)):
        arguments = inputs[i % len(inputs)]
        jax.block_until_ready(arguments)
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        if i >= len(inputs):
            best = min(best, time.perf_counter() - start)
    return best


def chain_seconds(step: Callable, state: Any, arguments: Sequence[Any], short: int = 20, long: int = 100) -> float:
    """Time of one of many dependent calls in one executable, launches included, dispatch not.

    `step(state, *arguments)` returns the next state. The difference of a long and a short chain removes what is paid
    once for each executable. The state is donated.
    """
    spent = []
    for length in (short, long):

        def chain(state: Any, *arguments: Any, length: int = length) -> Any:
            for _ in range(length):
                state = step(state, *arguments)
            return state

        compiled = jax.jit(chain, donate_argnums=0)
        for _ in range(3):
            state = jax.block_until_ready(compiled(state, *arguments))
        best = float("inf")
        for _ in range(7):
            start = time.perf_counter()
            state = jax.block_until_ready(compiled(state, *arguments))
            best = min(best, time.perf_counter() - start)
        spent.append(best)
    return (spent[1] - spent[0]) / (long - short)


def chained_device_seconds(step: Callable, state: Any, arguments: Sequence[Any], length: int = 10) -> float:
    """Device time of one call of `step(state, *arguments) -> (state, result)`, which may work on its state in place.

    The mean over a chain of calls in one executable, the median over repetitions; wall time where CUPTI is missing.
    """

    def chain(state: Any, *arguments: Any) -> tuple[Any, list[Any]]:
        results = []
        for _ in range(length):
            state, result = step(state, *arguments)
            results.append(result)
        return state, results

    compiled = jax.jit(chain, donate_argnums=0)
    state = jax.block_until_ready(compiled(state, *arguments))[0]
    times = []
    for _ in range(5):
        if cupti_available():
            held = [state]

            def run(held: list[Any] = held) -> None:
                held[0] = jax.block_until_ready(compiled(held[0], *arguments))[0]

            times.append(sum(kernel.seconds for kernel in launches(run)))
            (state,) = held
        else:
            start = time.perf_counter()
            state = jax.block_until_ready(compiled(state, *arguments))[0]
            times.append(time.perf_counter() - start)
    return statistics.median(times) / length


def rotations(bytes_read: float) -> int:
    """How many sets of inputs of this size make four times the L2, at least one and at most eight."""
    return max(1, min(8, -(-4 * _L2_BYTES // max(1, int(bytes_read)))))


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this device reaches, measured."""

    read: float
    """Bytes per second that a reduction reads."""
    copy: float
    """Bytes per second that a copy reads and writes together."""
    matmul: float
    """Flops per second of a bfloat16 matrix product of 8192 x 8192 x 8192."""

    def __str__(self) -> str:
        return (
            f"read {self.read / 1e12:.2f} TB/s, copy {self.copy / 1e12:.2f} TB/s, "
            f"bf16 matmul {self.matmul / 1e12:.0f} TFLOP/s"
        )


def measure_ceilings(seconds: Callable = device_seconds) -> Ceilings:
    """Ceilings of the default device; `seconds` as device_seconds."""
    x = jax.random.normal(jax.random.key(0), (1 << 14, 1 << 14), jnp.float32)
    read = seconds(jax.jit(jnp.sum), [(x,)])
    copy = seconds(jax.jit(lambda x: x + 1), [(x,)])
    size = 8192
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in _keys(2))
    matmul = seconds(jax.jit(jnp.matmul), [(a, b)])
    return Ceilings(x.nbytes / read, 2 * x.nbytes / copy, 2 * size**3 / matmul)


def _keys(count: int) -> Iterator[jax.Array]:
    return iter(jax.random.split(jax.random.key(1), count))
