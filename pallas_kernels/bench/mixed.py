"""The case of a mixed step: decode rows and a chunk of a prompt in one call of ragged_paged_attention."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.attention import Shape, attend, paged_arguments, plan
from pallas_kernels.bench.cases import Op, Timed, normal

DECODES, CONTEXT, CHUNK = 200, 1024, 2048


def _timed() -> list[Timed]:
    """One call for decode rows and a chunk of a prompt, against a call for each."""
    shape = Shape(DECODES, 1, CONTEXT)
    return [
        Timed(
            f"{DECODES} x 1 token, context {CONTEXT}, and a prompt of {CHUNK}",
            {"one call": _one_call, "one after the other": _two_calls},
            _arguments,
            read_bytes=shape.cache_bytes,
        )
    ]


def _one_call(q: jax.Array, k_cache: jax.Array, v_cache: jax.Array, plans: tuple) -> jax.Array:
    return attend(q, k_cache, v_cache, plans[0])


def _two_calls(q: jax.Array, k_cache: jax.Array, v_cache: jax.Array, plans: tuple) -> tuple[jax.Array, jax.Array]:
    decodes = attend(q[:DECODES], k_cache, v_cache, plans[1])
    return decodes, attend(q[DECODES:], k_cache, v_cache, plans[2])


def _arguments(seed: int) -> tuple:
    """q, caches and the plans of the whole step, of its decode rows and of its prompt."""
    lens = np.full(DECODES + 1, CONTEXT)
    lens[-1] = CHUNK
    shape = Shape(DECODES + 1, 1, CHUNK)
    _, k_cache, v_cache, tables, rows, _, _ = paged_arguments(shape, seed)
    starts = np.concatenate([np.arange(DECODES + 1), [DECODES + CHUNK]])
    kv_lens, cu_q_lens = jnp.asarray(lens, jnp.int32), jnp.asarray(starts, jnp.int32)
    one = slice(DECODES, DECODES + 1)
    num_tokens = DECODES + CHUNK
    prompt_starts = jnp.array([0, CHUNK], jnp.int32)

    def planned(num_tokens: int, decode_only: bool, *metadata: jax.Array) -> Any:
        return jax.jit(functools.partial(plan, None, shape, num_tokens, decode_only=decode_only))(*metadata)

    plans = (
        planned(num_tokens, False, tables, rows, cu_q_lens, kv_lens),
        planned(DECODES, True, tables, rows[:-1], cu_q_lens[:-1], kv_lens[:-1]),
        planned(CHUNK, False, tables, rows[one], prompt_starts, kv_lens[one]),
    )
    return normal((num_tokens, shape.heads, shape.head_dim), seed=seed), k_cache, v_cache, plans


MIXED_ATTENTION = Op("mixed", _timed, lambda: [], lambda: [])
