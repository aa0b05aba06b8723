"""Which requests can never run. A front end asks before it sends one to an engine core in another process."""

from __future__ import annotations

from vjax.errors import VjaxValidationError
from vjax.messages import EngineRequest


def check_request(request: EngineRequest, max_model_len: int, num_blocks: int, block_size: int) -> None:
    """Refuses what could not run even if it were alone.

    Args:
        num_blocks: KV blocks with the null block.

    Raises:
        VjaxValidationError: The prompt is empty or too long, or prompt and output need more KV blocks than there are.
    """
    num_prompt, max_tokens = len(request.prompt_token_ids), request.sampling_params.max_tokens
    assert max_tokens is not None
    if num_prompt == 0:
        message = "The decoder prompt cannot be empty; pass at least one token."
        raise VjaxValidationError(message, parameter="prompt")
    if request.pooling_type is not None:
        _check_pooling_request(num_prompt, max_model_len, num_blocks, block_size)
        return
    if num_prompt + 1 > max_model_len:
        raise VjaxValidationError(
            f"The decoder prompt (length {num_prompt}) plus the number of requested output tokens (at least 1) is "
            f"longer than the maximum model length of {max_model_len}; shorten the prompt or raise max_model_len.",
            parameter="prompt",
            value=num_prompt,
        )
    # The KV of the last token is never written.
    needed = -(-(min(num_prompt + max_tokens, max_model_len) - 1) // block_size)
    if needed > num_blocks - 1:
        raise VjaxValidationError(
            f"The prompt (length {num_prompt}) and max_tokens={max_tokens} need {needed} KV blocks of "
            f"{block_size} tokens, and the cache has {num_blocks - 1}: the request could never finish. "
            "Lower max_tokens, or enlarge the cache (gpu_memory_utilization, kv_cache_memory_bytes or "
            "num_gpu_blocks_override).",
            parameter="max_tokens",
            value=max_tokens,
        )


def _check_pooling_request(num_prompt: int, max_model_len: int, num_blocks: int, block_size: int) -> None:
    if num_prompt > max_model_len:
        raise VjaxValidationError(
            f"The prompt (length {num_prompt}) is longer than the maximum model length of {max_model_len}; shorten it, "
            "pass truncate_prompt_tokens, or raise max_model_len.",
            parameter="prompt",
            value=num_prompt,
        )
    needed = -(-num_prompt // block_size)
    if needed > num_blocks - 1:
        raise VjaxValidationError(
            f"The prompt (length {num_prompt}) needs {needed} KV blocks of {block_size} tokens, and the cache has "
            f"{num_blocks - 1}. Shorten it, or enlarge the cache (gpu_memory_utilization, kv_cache_memory_bytes or "
            "num_gpu_blocks_override).",
            parameter="prompt",
            value=num_prompt,
        )
