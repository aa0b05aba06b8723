"""Named KV write shapes: (num_kv_heads, head_dim) of real models and token counts of real steps."""

from __future__ import annotations

from pallas_kernels.ragged_paged_attention.shapes import MODELS

HEADS = {name: (shape.num_kv_heads, shape.head_dim) for name, shape in MODELS.items()}
NUM_TOKENS = (1, 64, 256, 8192)
