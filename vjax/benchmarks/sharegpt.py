"""Lengths like those of the ShareGPT conversations, without the data set.

The means, 161.31 prompt and 337.99 output tokens, are those of Figure 11 of "Efficient Memory Management for Large
Language Model Serving with PagedAttention" (Kwon et al., SOSP 2023). The paper gives no spread as a number: log-normal
lengths and their sigmas, 1.4 and 0.9, are chosen here. The medians are such that the means hold after the bounds.
"""

from __future__ import annotations

import numpy as np

from vjax.errors import ConfigError

PROMPT_MEDIAN, PROMPT_SIGMA = 92.62, 1.4
OUTPUT_MEDIAN, OUTPUT_SIGMA = 244.31, 0.9
#: vLLM's bounds for conversations that its benchmarks take.
MIN_LEN = 4
MAX_PROMPT_LEN = 1024
MAX_TOTAL_LEN = 2048
#: Smallest context for which lengths within the bounds are not too rare to draw.
MIN_CONTEXT = 32


def is_usual(prompt_len: np.ndarray | int, output_len: np.ndarray | int, max_total_len: int) -> np.ndarray:
    """Whether lengths are within the bounds; `max_total_len` is the model's, at most `MAX_TOTAL_LEN` counts."""
    prompt_len, output_len = np.asarray(prompt_len), np.asarray(output_len)
    return (
        (prompt_len >= MIN_LEN)
        & (output_len >= MIN_LEN)
        & (prompt_len <= MAX_PROMPT_LEN)
        & (prompt_len + output_len <= min(max_total_len, MAX_TOTAL_LEN))
    )


def draw_lengths(rng: np.random.Generator, count: int, max_total_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and output lengths, two int64 arrays [count]. What is out of bounds is drawn again, so a context below
    2048 tokens makes both shorter.

    Raises:
        ConfigError: The context is below `MIN_CONTEXT`.
    """
    if max_total_len < MIN_CONTEXT:
        raise ConfigError(
            f"max_model_len={max_total_len} is too short for ShareGPT-like lengths; it must be at least {MIN_CONTEXT}."
        )
    prompts, outputs = np.empty(0, np.int64), np.empty(0, np.int64)
    while len(prompts) < count:
        prompt = np.rint(rng.lognormal(np.log(PROMPT_MEDIAN), PROMPT_SIGMA, 4 * count)).astype(np.int64)
        output = np.rint(rng.lognormal(np.log(OUTPUT_MEDIAN), OUTPUT_SIGMA, 4 * count)).astype(np.int64)
        usual = is_usual(prompt, output, max_total_len)
        prompts, outputs = np.append(prompts, prompt[usual]), np.append(outputs, output[usual])
    return prompts[:count], outputs[:count]
