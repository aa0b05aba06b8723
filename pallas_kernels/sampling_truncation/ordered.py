"""float32 values as uint32 that compare like them, within a Mosaic kernel; both zeros give the same bits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_kernels.sampling_truncation.cta import SCALAR_LAYOUT

_SIGN = 0x80000000
_ALL = 0xFFFFFFFF


def ordered(values: jax.Array) -> jax.Array:
    """uint32 of an array."""
    return _ordered_bits(lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32))


def ordered_scalar(value: jax.Array, interpret: bool) -> jax.Array:
    """uint32 of a scalar."""
    return _ordered_bits(_bitcast(jnp.where(value == 0, 0.0, value), jnp.uint32, interpret))


def value_of(bits: jax.Array, interpret: bool) -> jax.Array:
    """The float32 of a scalar's ordered bits."""
    sign = jnp.uint32(_SIGN)
    return _bitcast(jnp.where(bits >= sign, bits ^ sign, bits ^ jnp.uint32(_ALL)), jnp.float32, interpret)


def _ordered_bits(bits: jax.Array) -> jax.Array:
    sign = jnp.uint32(_SIGN)
    return jnp.where(bits >= sign, bits ^ jnp.uint32(_ALL), bits | sign)


def _bitcast(scalar: jax.Array, dtype: Any, interpret: bool) -> jax.Array:
    """Mosaic GPU has bitcasts of arrays only."""
    if interpret:
        return lax.bitcast_convert_type(scalar, dtype)
    unsigned = dtype == jnp.uint32

    @plgpu.inline_mgpu(arg_types=(SCALAR_LAYOUT,), return_type=plgpu.ShapeDtypeStruct((), dtype, layout=SCALAR_LAYOUT))
    def cast(_: Any, value: Any) -> mgpu.FragmentedArray:
        wanted = ir.IntegerType.get_signless(32) if unsigned else ir.F32Type.get()
        bits = mgpu_utils.bitcast(value.registers.item(), wanted)
        return mgpu.FragmentedArray.splat(bits, (), is_signed=False if unsigned else None)

    return cast(scalar)  # pyright: ignore[reportReturnType, reportCallIssue]
