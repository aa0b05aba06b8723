"""Programs as bytes: lowered in one process, compiled in another.

A lowered program that calls an exported one is made in a few hundredths of a second, without tracing the step, and
compiles to the same instructions as the step itself.
"""

from __future__ import annotations

import dataclasses
import enum
import pickle
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jax.sharding import AbstractMesh, Mesh

from pallas_kernels import load_runtime
from vjax.models.arch import ArchConfig
from vjax.models.functional import build_model
from vjax.runner.programs import Key, Program, make_program
from vjax.runner.step import Step, StepGeometry

#: JAX exports no call of these because their meaning may change; here both sides are the same JAX.
_KERNEL_CALLS = ("mosaic_gpu", "mosaic_gpu_v2")

#: JAX's options that say where and how it runs, not what a program is.
_OTHER_OPTIONS = (
    "jax_backend_target",
    "jax_compilation_cache",
    "jax_cpu_",
    "jax_cross_host",
    "jax_cuda_visible_devices",
    "jax_default_device",
    "jax_enable_compilation_cache",
    "jax_export_",
    "jax_log",
    "jax_mock_",
    "jax_num_cpu_devices",
    "jax_persistent_cache",
    "jax_pjrt_",
    "jax_platform",
    "jax_transfer_guard",
    "jax_xla_backend",
    "mock_",
)


@dataclass(frozen=True)
class StepDescription:
    """All that decides the programs of a step on one device, as plain data; its repr names it.

    Attributes:
        arch, dtype, kv_scales: As given to `build_model`; of arch what programs depend on: fine-tuned models differ in
            the rest.
        geometry: Of the step.
        mesh: One device, whose kind decides how kernels are tuned.
        platform: What JAX calls the device's platform when it lowers, "cuda" or "cpu".
        jax_options: Options of JAX that bear on what a program is, by name.
    """

    arch: ArchConfig
    dtype: str
    kv_scales: bool
    geometry: StepGeometry
    mesh: AbstractMesh
    platform: str
    jax_options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, step: Step, mesh: Mesh, platform: str) -> StepDescription:
        """Describes a step on a mesh of one device, with this process's options."""
        assert mesh.size == 1, mesh
        model = step.model
        return cls(
            arch=dataclasses.replace(model.arch, torch_dtype=None, bos_token_id=None, eos_token_ids=()),
            dtype=jnp.dtype(model.dtype).name,
            kv_scales=model.kv_scales,
            geometry=step.geometry,
            mesh=mesh.abstract_mesh,
            platform=platform,
            jax_options=_jax_options(),
        )

    def make_step(self) -> Step:
        """The step, in a process that may not have its device."""
        return Step(build_model(self.arch, jnp.dtype(self.dtype), kv_scales=self.kv_scales), self.geometry)

    def set_jax_options(self) -> None:
        """Gives this process the options of the process that made the description, for good."""
        # Otherwise kernels are written down in an older form, for an older JAX to read.
        jax.config.update("jax_export_ignore_forward_compatibility", True)
        for name, value in self.jax_options:
            if jax.config.values[name] != value:
                jax.config.update(name, value.value if isinstance(value, enum.Enum) else value)


def _jax_options() -> tuple[tuple[str, Any], ...]:
    plain = (bool, int, float, str, enum.Enum, type(None))
    return tuple(
        (name, value)
        for name, value in sorted(jax.config.values.items())
        if isinstance(value, plain) and not name.startswith(_OTHER_OPTIONS)
    )


def export_program(description: StepDescription, step: Step, key: Key) -> bytes:
    """Lowers a program of `step`, made from `description`."""
    with jax.sharding.use_abstract_mesh(description.mesh):
        program = make_program(step, key, mesh=None)
    specs, structure = jax.tree.flatten(program.arguments)
    result: Any = None

    # Flat on both sides: a tree with our own types cannot be pickled, but the tree of the outputs' numbers can.
    def flat(*arrays):
        nonlocal result
        leaves, result_structure = jax.tree.flatten(program.function(*jax.tree.unflatten(structure, arrays)))
        result = jax.tree.unflatten(result_structure, range(len(leaves)))
        return leaves

    flat.__name__ = program.name
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in _KERNEL_CALLS]
    with jax.sharding.use_abstract_mesh(description.mesh):
        exported = export.export(jax.jit(flat), platforms=[description.platform], disabled_checks=checks)(*specs)
    return pickle.dumps((dataclasses.replace(exported, _get_vjp=None), result))


def import_program(program: Program, data: bytes, implementation: str) -> Program:
    """`program`, with what `export_program` made of it in place of its function. `data` is trusted.

    Args:
        implementation: Of the kernels, as in the step's geometry.
    """
    load_runtime(implementation)
    exported, result = pickle.loads(data)

    def call(*arguments):
        outputs = exported.call(*jax.tree.leaves(arguments))
        return jax.tree.map(lambda i: outputs[i], result)

    return dataclasses.replace(program, function=call)
