"""Arguments of the KV cache."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Size and behaviour of the paged KV cache. Plain values: `EngineArgs.resolve` validates them."""

    #: Tokens per block: 16, 32, 64 or 128.
    block_size: int = 16
    #: Fraction of the device's memory for weights, temporaries and KV cache together, in (0, 1].
    gpu_memory_utilization: float = 0.92
    #: Bytes for the KV cache; overrides `gpu_memory_utilization`. None on the CPU means 1 GiB.
    kv_cache_memory_bytes: int | None = None
    #: Number of blocks, whatever the memory says (tests, experiments).
    num_gpu_blocks_override: int | None = None
    #: Reuse the KV of equal prefixes across requests.
    enable_prefix_caching: bool = True
    #: dtype of the cache: "auto" (the model's on a GPU, float32 on the CPU), "bfloat16", "float16" or "float8_e4m3fn".
    cache_dtype: str = "auto"
    #: Blocks that exist, the null block included. 0 until the engine has measured the memory.
    num_gpu_blocks: int = 0
