"""Hidden sizes of real models, and token counts of real steps."""

from __future__ import annotations

HIDDEN = {
    "qwen2_0_5b": 896,
    "qwen2_1_5b": 1536,
    "llama3_1b": 2048,
    "qwen3_4b": 2560,
    "llama3_3b": 3072,
    "qwen2_7b": 3584,
    "llama3_8b": 4096,
    "qwen3_14b": 5120,
    "llama3_70b": 8192,
}
NUM_TOKENS = (1, 8, 64, 256, 8192)
