"""Requests to measure with, as token ids. All of them are functions of a seed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vjax.benchmarks import sharegpt


@dataclass(frozen=True)
class Request:
    prompt_token_ids: list[int]
    #: Tokens to generate, whether or not an end-of-sequence token is among them.
    output_len: int


def random_requests(
    count: int, *, input_len: int, output_len: int, range_ratio: float, vocab_size: int, seed: int
) -> list[Request]:
    """Uniform lengths in [len * (1 - range_ratio), len * (1 + range_ratio)], at least 1; a ratio of 0 fixes them."""
    rng = np.random.default_rng(seed)

    def lengths(mean: int) -> np.ndarray:
        low = max(1, int(np.floor(mean * (1 - range_ratio))))
        return rng.integers(low, max(low, int(np.ceil(mean * (1 + range_ratio)))), count, endpoint=True)

    return _with_lengths(rng, lengths(input_len), lengths(output_len), vocab_size)


def sharegpt_like_requests(
    count: int, *, output_len: int | None, max_total_len: int, vocab_size: int, seed: int
) -> list[Request]:
    """Random ids of ShareGPT-like lengths; `output_len` fixes the outputs' and cuts prompts to what then fits."""
    rng = np.random.default_rng(seed)
    prompts, outputs = sharegpt.draw_lengths(rng, count, max_total_len)
    if output_len is not None:
        prompts, outputs = np.minimum(prompts, max(1, max_total_len - output_len)), np.full(count, output_len)
    return _with_lengths(rng, prompts, outputs, vocab_size)


def prefix_repetition_requests(
    count: int, *, num_prefixes: int, prefix_len: int, suffix_len: int, output_len: int, vocab_size: int, seed: int
) -> list[Request]:
    """`num_prefixes` random prefixes, each before `count / num_prefixes` random suffixes (the first ones get what does
    not divide), in random order."""
    rng = np.random.default_rng(seed)
    prefixes = [_ids(rng, prefix_len, vocab_size) for _ in range(num_prefixes)]
    requests = [
        Request(prefixes[i % num_prefixes] + _ids(rng, suffix_len, vocab_size), output_len) for i in range(count)
    ]
    return [requests[i] for i in rng.permutation(count)]


def shared_prefix_requests(
    count: int, *, prefix_len: int, min_len: int, max_len: int, output_len: int, vocab_size: int, seed: int
) -> list[Request]:
    """One random prefix of all prompts, whose lengths, the prefix included, are uniform in [min_len, max_len]."""
    rng = np.random.default_rng(seed)
    prefix = _ids(rng, prefix_len, vocab_size)
    lengths = rng.integers(min_len, max_len, count, endpoint=True)
    return [Request(prefix + _ids(rng, int(n) - prefix_len, vocab_size), output_len) for n in lengths]


def repeated(requests: list[Request], repeat_count: int, *, sort: bool, seed: int) -> list[Request]:
    """Every request `repeat_count` times, by length of the prompt or in random order."""
    many = [request for request in requests for _ in range(repeat_count)]
    if sort:
        return sorted(many, key=lambda request: len(request.prompt_token_ids))
    return [many[i] for i in np.random.default_rng(seed).permutation(len(many))]


def _with_lengths(
    rng: np.random.Generator, input_lens: Iterable[int], output_lens: Iterable[int], vocab_size: int
) -> list[Request]:
    return [Request(_ids(rng, int(i), vocab_size), int(o)) for i, o in zip(input_lens, output_lens, strict=True)]


def _ids(rng: np.random.Generator, count: int, vocab_size: int) -> list[int]:
    return rng.integers(0, vocab_size, count).tolist()
