"""GPU kernels for LLM serving behind a small typed API. Imports jax and numpy only; see README.md for layouts.

Importing this package never imports Pallas: Mosaic GPU kernels are loaded when they are first asked for.
"""

from __future__ import annotations

from pallas_kernels.add_rms_norm.api import add_rms_norm
from pallas_kernels.implementation import IMPLEMENTATIONS, default_implementation, load_runtime, padded_head_dim
from pallas_kernels.kv_write.api import write_kv
from pallas_kernels.kv_write.rope import rope_write_kv
from pallas_kernels.matmul.api import gated_matmul, matmul
from pallas_kernels.matmul.xla import product_options
from pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from pallas_kernels.ragged_paged_attention.plan import AttentionPlan, plan_attention
from pallas_kernels.sampling_truncation.api import truncate_logits

__all__ = [
    "IMPLEMENTATIONS",
    "AttentionPlan",
    "add_rms_norm",
    "default_implementation",
    "gated_matmul",
    "load_runtime",
    "matmul",
    "padded_head_dim",
    "plan_attention",
    "product_options",
    "ragged_paged_attention",
    "rope_write_kv",
    "truncate_logits",
    "write_kv",
]
