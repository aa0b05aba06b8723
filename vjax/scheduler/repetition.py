"""Finds output that repeats itself: the rule of vLLM's `repetition_detection`."""

from __future__ import annotations

from collections.abc import Sequence

from vjax.sampling_params import RepetitionDetectionParams

#: What `stop_reason` says of a request that ended so.
REPETITION_DETECTED = "repetition_detected"


def ends_in_repetition(token_ids: Sequence[int], start: int, params: RepetitionDetectionParams) -> bool:
    """Whether the tokens from `start` on end with one pattern, `min_count` times in a row.

    Args:
        token_ids: A list or tuple; what stands before `start` is not looked at.
        params: `is_on`.
    """
    num_tokens, count = len(token_ids) - start, params.min_count
    last = token_ids[-1]
    for size in range(max(params.min_pattern_size, 1), min(params.max_pattern_size, num_tokens // count) + 1):
        # Repetitions of a pattern are what equals itself, moved by the pattern's length.
        if token_ids[-1 - size] == last and token_ids[-size * (count - 1) :] == token_ids[-size * count : -size]:
            return True
    return False
