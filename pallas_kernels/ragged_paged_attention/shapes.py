"""Named attention shapes of real models, shared by tests and benchmarks."""

from __future__ import annotations

from typing import NamedTuple


class AttentionShape(NamedTuple):
    """Heads of one model, as the cache sees them (head dims after padding)."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int


MODELS = {
    "llama3_8b": AttentionShape(32, 8, 128),
    "llama3_70b_tp8": AttentionShape(8, 1, 128),
    "llama2_7b": AttentionShape(32, 32, 128),
    "llama3_1b": AttentionShape(32, 8, 64),
    "qwen2_7b": AttentionShape(28, 4, 128),
    "qwen2_7b_tp4": AttentionShape(7, 1, 128),
    "qwen3_8b": AttentionShape(32, 8, 128),
    "gemma2_9b": AttentionShape(16, 8, 256),
}
