"""The products as XLA makes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_LEAST_CUBLAS_ROWS = 64


def product_options(rows: int) -> dict[str, bool | int]:
    """Options of XLA's compiler for products of so many rows: under which they are tuned, and vjax compiles.

    From 64 rows on cuBLAS is no slower than XLA's own products (steps of 64 and 256 rows took 7.0 and 15.5 to 16.2 ms
    with it, 7.1 to 7.2 and 16.2 to 16.9 with those), and trying those out is most of a program's compilation. Of cuBLAS
    the first 16 algorithms that it proposes are tried, and their results not compared: 32 instead of 40 s to compile a
    step of Llama-3-8B.
    """
    return {
        "xla_gpu_autotune_level": 1,
        "xla_gpu_blas_max_algorithms": 16,
        "xla_gpu_enable_triton_gemm": rows < _LEAST_CUBLAS_ROWS,
    }


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """See api.matmul; float32 operands are multiplied as float32, not as TF32."""
    precision = lax.Precision.HIGHEST if x.dtype == "float32" else None
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), precision=precision)


def gated_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """See api.gated_matmul; one product, both halves of which are rounded to the dtype of x."""
    depth, halves, columns = w.shape
    product = matmul(x, w.reshape(depth, halves * columns)).reshape(-1, halves, columns).astype(jnp.float32)
    return (jax.nn.silu(product[:, 0]) * product[:, 1]).astype(x.dtype)
