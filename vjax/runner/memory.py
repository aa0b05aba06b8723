"""How many KV blocks fit.

On a GPU the pool that XLA may use is fixed when its backend starts; KV gets what the weights, the temporaries of one
executable and a little room for small arrays leave. Temporaries are taken when an executable is dispatched and given
back before the next one is, so the largest counts and not their sum. They are estimated before anything is compiled, so
that executables are compiled once, for their final shapes; `check_temporaries` then holds the estimate against the
compiler's own figures.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from vjax.config.engine_config import EngineConfig
from vjax.errors import OutOfMemoryError
from vjax.log import logger
from vjax.models.arch import ArchConfig

log = logger(__name__)

_GIB = 1 << 30
DEFAULT_CPU_KV_BYTES = 1 * _GIB
#: The holes of `room_for_small_arrays`: for what a step is sent and sends back, less than any step's temporaries; for
#: masks of grammars; for the temporaries of small steps.
_HOLES = (3 << 17, 9 << 19, 118 << 20)
#: The holes and what separates them.
_SMALL_ARRAYS = _GIB // 8
#: Free pieces among the weights that are filled until two arrays lie behind each other.
_MAX_FILLED = 256
#: The least that stays free for temporaries. XLA's allocator gives a piece away whole if less than 128 MiB of it would
#: be left: the last array of the KV cache would take all that was kept for a small model's steps.
_LEAST_TEMPORARIES = _GIB // 4
#: What GEMM autotuning of one program may take before the KV cache is there; the head's takes half of it.
_COMPILE_SCRATCH = 2 * _GIB
_MAX_COMPILE_THREADS = 16


def block_bytes(arch: ArchConfig, block_size: int, kv_head_dim: int, itemsize: int) -> int:
    """Bytes of one block in all layers, K and V."""
    return 2 * arch.num_layers * arch.num_kv_heads * block_size * kv_head_dim * itemsize


def temporary_bytes(arch: ArchConfig, config: EngineConfig, itemsize: int) -> int:
    """What is kept for the largest executable's temporaries: an estimate of those of forward in the widest layer with
    the most tokens, and of sample (three arrays of all rows' logits), and at least _LEAST_TEMPORARIES. A model that
    pools has no logits, but the hidden states of two steps on their way to `pool`."""
    tokens, rows = config.scheduler.max_num_batched_tokens, config.scheduler.max_num_seqs
    qkv = (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim
    widest = max(3 * arch.intermediate_size, 2 * qkv + 3 * arch.num_heads * arch.head_dim) + 4 * arch.hidden_size
    if arch.pools:
        return max(tokens * (widest + 2 * arch.hidden_size) * itemsize, _LEAST_TEMPORARIES)
    return max(tokens * widest * itemsize, 3 * rows * arch.vocab_size * 4, _LEAST_TEMPORARIES)


def num_kv_blocks(
    config: EngineConfig,
    arch: ArchConfig,
    *,
    kv_head_dim: int,
    kv_itemsize: int,
    itemsize: int,
    weight_bytes: int,
    device: Any,
) -> int:
    """Blocks to allocate, the null block included.

    Args:
        itemsize: That of activations, for the temporaries.
        weight_bytes: Of weights that are still to be loaded.

    Raises:
        OutOfMemoryError: Not even one request of max_model_len fits; the text names the numbers and the knob.
    """
    cache = config.cache
    per_block = block_bytes(arch, cache.block_size, kv_head_dim, kv_itemsize)
    if cache.num_gpu_blocks_override is not None:
        blocks, source = cache.num_gpu_blocks_override, "num_gpu_blocks_override"
    else:
        available, source = _available_bytes(config, arch, itemsize, weight_bytes, device)
        blocks = max(available, 0) // per_block
    max_model_len = config.model.max_model_len
    needed = math.ceil(max_model_len / cache.block_size) + 1
    if blocks < needed:
        fits = max(blocks - 1, 0) * cache.block_size
        lower = f"Lower max_model_len to at most {fits}, or raise" if fits else "Raise"
        raise OutOfMemoryError(
            f"The KV cache ({source}) has {blocks} blocks of {cache.block_size} tokens ({_size(blocks * per_block)}), "
            f"the null block included, but one request of max_model_len={max_model_len} tokens needs {needed} "
            f"({_size(needed * per_block)}). {lower} {_knob(config, device, needed * per_block)}."
        )
    return blocks


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= _GIB // 10 else f"{num_bytes / (1 << 20):.2f} MiB"


def _knob(config: EngineConfig, device: Any, needed_bytes: int) -> str:
    if config.cache.num_gpu_blocks_override is not None:
        return f"num_gpu_blocks_override to at least {-(-config.model.max_model_len // config.cache.block_size) + 1}"
    if device.platform == "cpu" or config.cache.kv_cache_memory_bytes is not None:
        return f"kv_cache_memory_bytes to at least {needed_bytes}"
    return "gpu_memory_utilization"


def _available_bytes(
    config: EngineConfig, arch: ArchConfig, itemsize: int, weight_bytes: int, device: Any
) -> tuple[int, str]:
    if (explicit := config.cache.kv_cache_memory_bytes) is not None:
        return explicit, f"kv_cache_memory_bytes={explicit}"
    if device.platform == "cpu":
        return DEFAULT_CPU_KV_BYTES, f"kv_cache_memory_bytes={DEFAULT_CPU_KV_BYTES}, the default on the CPU"
    stats = device.memory_stats()
    limit, in_use = stats["bytes_limit"], stats["bytes_in_use"] + weight_bytes
    temporaries = temporary_bytes(arch, config, itemsize)
    available = limit - in_use - temporaries - _SMALL_ARRAYS
    log.info(
        "device memory: %.1f GiB usable, %.1f GiB in use by weights, %.1f GiB kept for temporaries, %.1f GiB for KV",
        limit / _GIB,
        in_use / _GIB,
        (temporaries + _SMALL_ARRAYS) / _GIB,
        available / _GIB,
    )
    return available, f"gpu_memory_utilization={config.cache.gpu_memory_utilization}"


def num_bytes(specs: Iterable[Any]) -> int:
    """Bytes of arrays with these shapes and dtypes."""
    return sum(math.prod(s.shape) * s.dtype.itemsize for s in specs)


def compile_threads(device: Any) -> int:
    """How many threads may compile for a GPU whose weights are loaded: one a core, as far as memory lasts."""
    stats = device.memory_stats()
    free = stats["bytes_limit"] - stats["bytes_in_use"]
    return max(1, min(_MAX_COMPILE_THREADS, os.cpu_count() or 1, free // _COMPILE_SCRATCH))


def check_weights_fit(specs: Iterable[Any], config: EngineConfig, device: Any) -> None:
    """Checked before the first weight is loaded.

    Raises:
        OutOfMemoryError: The weights alone exceed what XLA's pool has left.
    """
    stats = device.memory_stats() if device.platform != "cpu" else None
    if not stats:
        return
    needed = num_bytes(specs)
    free = stats["bytes_limit"] - stats["bytes_in_use"]
    if needed > free:
        raise OutOfMemoryError(
            f"The weights take {needed / _GIB:.2f} GiB in {config.model.dtype}, and {free / _GIB:.2f} GiB of "
            f"{device.device_kind} are free within gpu_memory_utilization={config.cache.gpu_memory_utilization}. Raise "
            "gpu_memory_utilization, free what else this process holds on the device, or use a smaller model."
        )


def check_temporaries(executables: Iterable[Any], arch: ArchConfig, config: EngineConfig, itemsize: int) -> None:
    """Warns when one of the compiled executables needs more temporary memory than was kept for it."""
    actual = max(compiled.memory_analysis().temp_size_in_bytes for compiled in executables)
    kept = temporary_bytes(arch, config, itemsize)
    log.debug("temporaries: %.2f GiB needed, %.2f GiB kept", actual / _GIB, kept / _GIB)
    if actual > kept:
        log.warning(
            "the largest step needs %.2f GiB of temporaries, %.2f GiB were kept: lower gpu_memory_utilization or "
            "max_num_batched_tokens if it runs out of memory",
            actual / _GIB,
            kept / _GIB,
        )


@contextmanager
def room_for_small_arrays(device: Any) -> Iterator[list[Any]]:
    """Leaves holes in the device's memory before what is allocated within the context.

    The allocator takes the smallest free piece that fits. So small arrays go into the holes, and the one large piece
    behind the KV cache, without which the largest step cannot run, stays whole. And as what steps are sent, which lies
    somewhere else in each, has a hole to itself, temporaries find theirs as the step before left it, and take the same
    addresses: then a CUDA graph has nothing to update but the few kernels that read the former. Of the 2.4 ms that it
    takes to dispatch a decode step of 64 rows of Llama-3-8B that saves 1.0.

    Yields:
        What keeps the holes apart: to be kept as long as what is allocated within. Deleted when that fails.
    """

    def allocate(size: int) -> tuple[Any, int]:
        array = jax.block_until_ready(jnp.empty(size, jnp.uint8, device=device))
        return array, array.unsafe_buffer_pointer()

    holes, walls = separate_holes(_HOLES, allocate)
    try:
        yield walls
    except BaseException:
        holes += walls
        raise
    finally:
        for array in holes:
            array.delete()


def separate_holes(sizes: Sequence[int], allocate: Callable[[int], tuple[Any, int]]) -> tuple[list[Any], list[Any]]:
    """Arrays of `sizes` that will be holes, and arrays that keep all but the last, behind which nothing is free, from
    becoming one with other free memory.

    Args:
        allocate: An array of so many bytes, and its address.
    """
    holes, walls = [], []
    for size in sizes[:-1]:
        # Where smaller pieces are free than the large one they are taken first, and filled.
        hole, address = allocate(size)
        for _ in range(_MAX_FILLED):
            wall, next_address = allocate(size)
            if next_address == address + size:
                walls.append(wall)
                break
            walls.append(hole)
            hole, address = wall, next_address
        holes.append(hole)
    holes.append(allocate(sizes[-1])[0])
    return holes, walls


def allocate(specs: Any, shardings: Any, what: str) -> Any:
    """Zeros of `specs`, made on the device.

    Args:
        what: Names them in the error.

    Raises:
        OutOfMemoryError: The device has no room for them.
    """
    make = jax.jit(lambda: jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), specs), out_shardings=shardings)
    with explained(jax.tree.leaves(specs), what):
        return jax.block_until_ready(make())


@contextmanager
def explained(specs: Iterable[Any], what: str) -> Iterator[None]:
    """Around the allocation of `what`, arrays like `specs`.

    Raises:
        OutOfMemoryError: In place of what JAX raises where the device has no room for them.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        raise OutOfMemoryError(
            f"The device has no {_size(num_bytes(specs))} left for {what}: lower gpu_memory_utilization or "
            f"kv_cache_memory_bytes, or free what else this process holds on the device. ({e})"
        ) from e
