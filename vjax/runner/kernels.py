"""Compiles the Mosaic GPU kernels of lowered programs ahead of the programs.

XLA's code generator and Mosaic's set different options of LLVM, which has one set in a process: where threads compile
programs with kernels in them, each waits until no thread is in the other one. A process keeps a kernel that it
compiled, by a hash of it, so that a program whose kernels are there needs XLA's alone.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import PriorityQueue
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxlib.mlir import ir

from vjax.log import logger
from vjax.parallel.sharding import named_sharding
from vjax.runner.programs import Program, lower

log = logger(__name__)

_TARGET = "mosaic_gpu_v2"
#: What a call takes beside the kernel, all of it False where one device runs the kernel.
_FLAGS = ("use_custom_barrier", "skip_device_barrier", "uses_xla_collective_metadata")
#: Four a core, as most wait: a thread that has its kernel compiled cannot go on to the next before all others have.
_NUM_THREADS = 4 * min(16, os.cpu_count() or 1)


def kernels_of(lowered: Any) -> set[bytes]:
    """The kernels of a lowered program, as Mosaic GPU's bytecode; without those that more than a device needs."""
    found: set[bytes] = set()

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.name == "stablehlo.custom_call" and ir.StringAttr(op.attributes["call_target_name"]).value == _TARGET:
            config = ir.DictAttr(op.attributes["mhlo.backend_config"])
            given = {item.name: item.attr for item in config}
            module, digest = (ir.StringAttr(given.pop(name)).value_bytes for name in ("module", "kernel_hash"))
            plain = set(given) == set(_FLAGS) and not any(ir.BoolAttr(flag).value for flag in given.values())
            if plain and digest == hashlib.sha256(module).digest():
                found.add(module)
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return found


class KernelCompiler:
    """Compiles kernels in threads of its own, of those that wait the longest bytecode first: what is compiled at the
    same time should take equally long. A context manager.

    Args:
        mesh: The device.
        tracing: Held while JAX traces.
    """

    def __init__(self, mesh: Mesh, tracing: Any):
        self._mesh = mesh
        self._tracing = tracing
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="vjax-kernel")
        self._waiting: PriorityQueue[tuple[int, bytes]] = PriorityQueue()
        self._futures: dict[bytes, Future[None]] = {}

    def __enter__(self) -> KernelCompiler:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, kernels: set[bytes]) -> None:
        """Has kernels compiled that were not yet added."""
        new = kernels - self._futures.keys()
        for kernel in new:
            self._waiting.put((-len(kernel), kernel))
        # A future stands for one kernel of those that wait, not for the one under whose name it is kept.
        self._futures |= {kernel: self._pool.submit(self._compile_next) for kernel in new}

    def wait(self) -> int:
        """Returns when all are compiled: how many."""
        wait(self._futures.values())
        return len(self._futures)

    def _compile_next(self) -> None:
        _, kernel = self._waiting.get_nowait()
        try:
            with self._tracing:
                lowered = lower(_kernel_program(kernel, self._mesh), self._mesh)
            lowered.compile()
        except Exception as e:  # the program that calls it will say so
            log.debug("a kernel was not compiled ahead: %s: %s", type(e).__name__, e)


def _kernel_program(kernel: bytes, mesh: Mesh) -> Program:
    """A program that has the kernel compiled, not one to be run: the kernel's code does not depend on its arrays, and
    gets none."""
    call = jax.ffi.ffi_call(_TARGET, (), has_side_effect=True)
    flags: dict[str, Any] = dict.fromkeys(_FLAGS, False)

    def kernel_alone(x):
        call(module=kernel, kernel_hash=hashlib.sha256(kernel).digest(), **flags)
        return x

    place = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=named_sharding(mesh, (None,)))
    return Program("kernel_alone", kernel_alone, (), (place,))
