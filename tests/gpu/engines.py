"""Small engines for the tests of this folder, and what the device holds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from vjax import LLM, SamplingParams

#: One pool serves all engines of a test run.
GPU_MEMORY_UTILIZATION = 0.3


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


def settled_device_bytes(limit: int, seconds: float = 5.0) -> int:
    """Bytes in use on the device as soon as they are at most `limit`, or after `seconds`: the device frees what a
    running step still reads when that step is done."""
    deadline = time.monotonic() + seconds
    while (in_use := device_bytes()) > limit and time.monotonic() < deadline:
        time.sleep(0.02)
    return in_use


def peak_device_bytes() -> int:
    """The most bytes that were ever in use on the device; 0 where that is not known."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
