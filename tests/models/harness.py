"""Runs a whole prompt through a loaded model, as the engine's step would: flat tokens, paged cache, xla kernels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from vjax.models.decoder import AttentionMetadata
from vjax.models.functional import FunctionalModel, build_model
from vjax.models.registry import arch_config_from_hf, read_hf_config
from vjax.parallel.sharding import make_mesh
from vjax.weights.loader import load_weights

BLOCK_SIZE = 16


def load(path: str, dtype: Any = jnp.float32) -> tuple[FunctionalModel, tuple[jax.Array, ...]]:
    """The model at `path` and its leaves."""
    model = build_model(arch_config_from_hf(read_hf_config(path)), dtype)
    return model, load_weights(model, path, mesh=make_mesh(), show_progress=False)


def empty_cache(model: FunctionalModel, num_blocks: int, head_dim: int | None = None) -> tuple:
    """Zeroed caches, one (K, V) pair per layer."""
    arch = model.arch
    shape = (num_blocks, arch.num_kv_heads, BLOCK_SIZE, head_dim or arch.head_dim)
    return tuple((jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype)) for _ in range(arch.num_layers))


def run_step(
    model: FunctionalModel,
    leaves: tuple[jax.Array, ...],
    kv: tuple,
    table: np.ndarray,
    chunks: list[tuple[list[int], int]],
    num_padding: int = 0,
) -> tuple[np.ndarray, tuple]:
    """One step: chunks of (token ids, position of the first), chunk s belonging to row s + 1 of the block table.

    Returns the logits of all tokens (without padding) and the caches.
    """
    ids = np.concatenate([chunk for chunk, _ in chunks]).astype(np.int32)
    positions = np.concatenate([start + np.arange(len(chunk)) for chunk, start in chunks]).astype(np.int32)
    rows = np.concatenate([np.full(len(chunk), row + 1) for row, (chunk, _) in enumerate(chunks)])
    slots = (table[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE).astype(np.int32)
    num_tokens = len(ids)
    cu_q_lens = np.cumsum([0] + [len(chunk) for chunk, _ in chunks]).astype(np.int32)
    kv_lens = np.array([start + len(chunk) for chunk, start in chunks], np.int32)
    padded = [
        np.pad(array, (0, num_padding), constant_values=fill) for array, fill in ((ids, 0), (positions, 0), (slots, -1))
    ]
    cache_dim = kv[0][0].shape[-1]

    @jax.jit
    def step(leaves, kv, ids, positions, slots, table, table_rows, cu_q_lens, kv_lens):
        plan = pallas_kernels.plan_attention(
            table,
            table_rows,
            cu_q_lens,
            kv_lens,
            num_tokens=num_tokens + num_padding,
            num_q_heads=model.arch.num_heads,
            num_kv_heads=model.arch.num_kv_heads,
            head_dim=cache_dim,
            block_size=BLOCK_SIZE,
            dtype=model.dtype,
            decode_only=False,
            implementation="xla",
        )
        hidden, kv = model.forward(leaves, ids, kv, AttentionMetadata(positions, slots, plan))
        return model.logits(model.head_leaves(leaves), hidden), kv

    table_rows = np.arange(1, len(chunks) + 1, dtype=np.int32)
    logits, kv = step(leaves, kv, *padded, table, table_rows, cu_q_lens, kv_lens)
    return np.asarray(logits)[:num_tokens], kv


def prompt_logits(path: str, prompt: list[int], head_dim: int | None = None) -> np.ndarray:
    """Logits f32 `[len(prompt), vocab]` of one prompt in one step."""
    model, leaves = load(path)
    num_blocks = -(-len(prompt) // BLOCK_SIZE)
    table = np.zeros((2, num_blocks), np.int32)
    # Blocks in reverse order, so that a kernel that ignores the table fails.
    table[1] = np.arange(num_blocks, 0, -1)
    logits, _ = run_step(model, leaves, empty_cache(model, num_blocks + 1, head_dim), table, [(prompt, 0)])
    return logits
