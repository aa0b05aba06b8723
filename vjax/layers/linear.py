"""Dense products of the decoders."""

from __future__ import annotations

import jax
from jax import lax
from jax.sharding import Mesh

import pallas_kernels


def unsharded(implementation: str, mesh: Mesh | None) -> str:
    """Which kernels serve arrays that XLA shards as it likes: it cannot partition ours, so on several devices its own.

    `implementation` is that of the step's kernels.
    """
    return "xla" if mesh is not None and mesh.size > 1 else implementation


def matmul(x: jax.Array, w: jax.Array, implementation: str) -> jax.Array:
    """x `[T, K]` @ w `[K, N]` -> `[T, N]` in the dtype of x, one GEMM.

    Sums are in float32 for 16-bit operands; float32 operands are multiplied as float32, not as TF32.
    """
    return pallas_kernels.matmul(x, w, implementation=implementation)


def contract(x: jax.Array, w: jax.Array, axes: tuple[int, int], *, preferred_element_type=None) -> jax.Array:
    """Sums over axis `axes[0]` of x and `axes[1]` of w, both matrices; precision as in `matmul`, XLA's product."""
    precision = lax.Precision.HIGHEST if x.dtype == "float32" else None
    dimension_numbers = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(x, w, dimension_numbers, precision=precision, preferred_element_type=preferred_element_type)
