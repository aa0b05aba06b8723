"""Small engines for the tests of this folder, and what the device holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax

from tests.gpu.conftest import GPU_MEMORY_UTILIZATION
from vjax import LLM, SamplingParams


def make_llm(model: str = "vjax-tiny", **kwargs: Any) -> LLM:
    """An engine for prompts and outputs of up to 512 tokens, with 256 MiB of KV cache."""
    defaults = {
        "max_model_len": 512,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 1024,
        "kv_cache_memory_bytes": 256 << 20,
        "gpu_memory_utilization": GPU_MEMORY_UTILIZATION,
    }
    return LLM(model, **{**defaults, **kwargs})


def token_prompts(prompts: Iterable[Sequence[int]]) -> list[dict[str, list[int]]]:
    """Token ids as `LLM.generate` takes them."""
    return [{"prompt_token_ids": list(prompt)} for prompt in prompts]


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)


def generated_ids(llm: LLM, prompts: Iterable[Sequence[int]], params: Any) -> list[list[int]]:
    """Token ids of the first completion of each prompt."""
    return [o.outputs[0].token_ids for o in llm.generate(token_prompts(prompts), params, use_tqdm=False)]


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def device_bytes() -> int:
    """Bytes in use on the device."""
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_in_use"] if stats else sum(array.nbytes for array in jax.live_arrays())


def peak_device_bytes() -> int | None:
    """The most bytes that were ever in use on the device, or None where that is not known."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else None
