"""Cases of write_kv and rope_write_kv."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.cases import Checked, Op, Timed, Tuned, normal, relative_error
from pallas_kernels.kv_write import reference
from pallas_kernels.kv_write.api import write_kv
from pallas_kernels.kv_write.rope import rope_write_kv
from pallas_kernels.ragged_paged_attention.shapes import MODELS

_IMPLEMENTATIONS = ("mosaic_gpu", "xla")
_NUM_BLOCKS, _BLOCK_SIZE = 4096, 16
_MODELS = ("llama3_8b", "llama2_7b", "gemma2_9b")
_NUM_TOKENS = (1, 64, 256, 8192)


def _caches(num_kv_heads: int, head_dim: int, num_blocks: int = _NUM_BLOCKS) -> tuple[jax.Array, jax.Array]:
    shape = (num_blocks, num_kv_heads, _BLOCK_SIZE, head_dim)
    return jnp.zeros(shape, jnp.bfloat16), jnp.zeros(shape, jnp.bfloat16)


def _slots(num_tokens: int, num_blocks: int = _NUM_BLOCKS) -> jax.Array:
    slots = np.random.default_rng(0).permutation((num_blocks - 1) * _BLOCK_SIZE)[:num_tokens] + _BLOCK_SIZE
    return jnp.asarray(slots, jnp.int32)


def _timed_write(model: str, num_tokens: int, columns: dict[str, Callable]) -> Timed:
    _, num_kv_heads, head_dim = MODELS[model]

    def step(write: Callable, state: Any, k: jax.Array, v: jax.Array, slots: jax.Array) -> tuple:
        return write(*state, k, v, slots), ()

    def arguments(seed: int) -> tuple[Any, ...]:
        new = [normal((num_tokens, num_kv_heads, head_dim), seed=seed + i) for i in range(2)]
        return *new, _slots(num_tokens)

    read = 4 * num_tokens * num_kv_heads * head_dim
    return Timed(
        f"{model} {num_kv_heads}x{head_dim}, {num_tokens} tokens",
        {name: functools.partial(step, write) for name, write in columns.items()},
        arguments,
        read_bytes=read,
        bytes_moved=2 * read,
        state=lambda: _caches(num_kv_heads, head_dim),
    )


def _write_timed() -> list[Timed]:
    columns = {name: functools.partial(write_kv, implementation=name) for name in _IMPLEMENTATIONS}
    return [_timed_write(model, num_tokens, columns) for model in _MODELS for num_tokens in _NUM_TOKENS]


def _write_tuned() -> list[Tuned]:
    from pallas_kernels.kv_write import mosaic_registers as kernel

    def timed(model: str, num_tokens: int, config: Any) -> list[Timed]:
        write = jax.jit(functools.partial(kernel.write_kv, config=config, interpret=False))
        return [_timed_write(model, num_tokens, {"config": write})]

    return [
        Tuned(
            "write_kv",
            {"num_kv_heads": MODELS[model].num_kv_heads, "head_dim": MODELS[model].head_dim},
            {"num_tokens": num_tokens},
            [kernel.Config(tokens) for tokens in (1, 2, 4)],
            functools.partial(timed, model, num_tokens),
        )
        for model in _MODELS
        for num_tokens in _NUM_TOKENS
    ]


def _write_error(shape: tuple[int, int], num_tokens: int, implementation: str) -> float:
    k, v = (normal((num_tokens, *shape), seed=seed) for seed in range(2))
    slots = _slots(num_tokens, 600).at[:: max(2, num_tokens // 4)].set(-1)
    k_cache, v_cache = (normal((600, shape[0], _BLOCK_SIZE, shape[1]), seed=seed) for seed in (2, 3))
    got = write_kv(k_cache, v_cache, k, v, slots, implementation=implementation)
    host = [np.asarray(x) for x in (k_cache, v_cache, k, v, slots)]
    wanted = reference.write_kv(host[0], host[1], host[2], host[3], host[4])
    return max(relative_error(a, b) for a, b in zip(got, wanted, strict=True))


def _write_checked() -> list[Checked]:
    shapes = sorted({(shape.num_kv_heads, shape.head_dim) for shape in MODELS.values()})
    return [
        Checked(f"{heads}x{dim}, {n} tokens", functools.partial(_write_error, (heads, dim), n), 0.0)
        for heads, dim in shapes
        for n in (1, 67, 2048)
    ]


def _rope_arguments(model: str, num_tokens: int, normed: bool, seed: int) -> tuple:
    """qkv, cos, sin, slots and the norms of a packed call."""
    num_q_heads, num_kv_heads, head_dim = MODELS[model]
    qkv = normal((num_tokens, num_kv_heads, num_q_heads // num_kv_heads + 2, head_dim), seed=seed)
    angles = normal((num_tokens, head_dim // 2), jnp.float32, seed + 1) * 3
    norms = (normal((head_dim,), seed=seed + 2), normal((head_dim,), seed=seed + 3)) if normed else (None, None)
    return qkv, jnp.cos(angles), jnp.sin(angles), _slots(num_tokens), *norms


def _rope_timed() -> list[Timed]:
    def step(implementation: str, state: Any, qkv: Any, cos: Any, sin: Any, slots: Any, q_norm: Any, k_norm: Any):
        options = {"q_norm": q_norm, "k_norm": k_norm, "implementation": implementation}
        q, k_cache, v_cache = rope_write_kv(qkv, cos, sin, state[0], state[1], slots, **options)
        return (k_cache, v_cache), q

    cases = []
    for model, normed in (("llama3_8b", False), ("qwen3_8b", True), ("gemma2_9b", False)):
        num_q_heads, num_kv_heads, head_dim = MODELS[model]
        for num_tokens in _NUM_TOKENS:
            read = 2 * num_tokens * (num_q_heads + 2 * num_kv_heads) * head_dim
            cases.append(
                Timed(
                    f"{model} {num_q_heads}/{num_kv_heads}x{head_dim}{' norms' * normed}, {num_tokens} tokens",
                    {name: functools.partial(step, name) for name in _IMPLEMENTATIONS},
                    functools.partial(_rope_arguments, model, num_tokens, normed),
                    read_bytes=read,
                    bytes_moved=2 * read,
                    state=functools.partial(_caches, num_kv_heads, head_dim),
                )
            )
    return cases


def _rope_error(model: str, num_tokens: int, normed: bool, implementation: str) -> float:
    qkv, cos, sin, slots, *norms = _rope_arguments(model, num_tokens, normed, seed=5)
    slots = slots % (599 * _BLOCK_SIZE) if num_tokens == 1 else _slots(num_tokens, 600).at[::5].set(-1)
    _, num_kv_heads, head_dim = MODELS[model]
    caches = _caches(num_kv_heads, head_dim, 600)
    options = dict(zip(("q_norm", "k_norm"), norms, strict=True))
    got = rope_write_kv(qkv, cos, sin, *caches, slots, **options, implementation=implementation)
    host = np.asarray(qkv)
    q, k, v = host[:, :, :-2].reshape(num_tokens, -1, head_dim), host[:, :, -2], host[:, :, -1]
    q_norm, k_norm = (None if norm is None else np.asarray(norm) for norm in norms)
    rest = [np.asarray(x) for x in (cos, sin, *caches, slots)]
    wanted = reference.rope_write_kv(q, k, v, rest[0], rest[1], rest[2], rest[3], rest[4], q_norm, k_norm)
    return max(relative_error(a, b) for a, b in zip(got, wanted, strict=True))


def _rope_checked() -> list[Checked]:
    return [
        Checked(f"{model}{' norms' * normed}, {n} tokens", functools.partial(_rope_error, model, n, normed), 1e-2)
        for model in MODELS
        for n, normed in ((1, False), (67, True), (2048, False))
    ]


def _none() -> Sequence[Tuned]:
    return []


WRITE_KV = Op("write_kv", _write_timed, _write_tuned, _write_checked)
ROPE_WRITE_KV = Op("rope_write_kv", _rope_timed, _none, _rope_checked)
