"""One timed call of `LLM.generate` that waits for no compiler."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vjax.benchmarks.workloads import Request
from vjax.errors import ConfigError, EngineStepError

if TYPE_CHECKING:
    from vjax.llm import LLM


@dataclass(frozen=True)
class Run:
    """One call of `generate`. Token counts are sums over the requests."""

    seconds: float
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    #: Prompt tokens that came from the prefix cache.
    num_cached_tokens: int
    #: Steps that waited for the compiler; 0 is what a measurement should have.
    num_compilations: int
    #: Seconds from the call to the first token, averaged over the requests; None with disable_log_stats.
    mean_first_token_latency: float | None


def prepare(llm: LLM, requests: Sequence[Request]) -> None:
    """Compiles everything that any step may need.

    Raises:
        ConfigError: A prompt with its output is longer than the model's context, which would cut the output short.
    """
    max_model_len = llm.llm_engine.config.model.max_model_len
    longest = max(requests, key=lambda r: len(r.prompt_token_ids) + r.output_len)
    prompt_len = len(longest.prompt_token_ids)
    if prompt_len + longest.output_len > max_model_len:
        raise ConfigError(
            f"A request of {prompt_len} prompt tokens and {longest.output_len} output tokens does not fit "
            f"max_model_len={max_model_len}; choose shorter lengths or a larger --engine.max_model_len."
        )
    llm.llm_engine.warm_up()


def timed_generate(
    llm: LLM, requests: Sequence[Request], *, temperature: float, detokenize: bool, show_progress: bool | None = None
) -> Run:
    """Completes all requests, each to its full length, and leaves an empty prefix cache.

    Args:
        requests: Seen by `prepare`.
        detokenize: Needs an LLM with a tokenizer.
        show_progress: None: where stderr is a terminal.

    Raises:
        EngineStepError: A request failed on the device.
    """
    from vjax.sampling_params import SamplingParams

    params = [
        SamplingParams(temperature=temperature, max_tokens=r.output_len, ignore_eos=True, detokenize=detokenize)
        for r in requests
    ]
    num_compilations = llm.llm_engine.num_compilations_while_serving
    start = time.perf_counter()
    outputs = llm.generate(
        [{"prompt_token_ids": r.prompt_token_ids} for r in requests],
        params,
        use_tqdm=sys.stderr.isatty() if show_progress is None else show_progress,
    )
    seconds = time.perf_counter() - start
    completions = [output.outputs[0] for output in outputs]
    failed = [c.error for c in completions if c.error is not None]
    if failed:
        raise EngineStepError(f"{len(failed)} of {len(requests)} requests failed; the first one: {failed[0]}")
    assert [len(c.token_ids) for c in completions] == [r.output_len for r in requests]
    was_reset = llm.reset_prefix_cache()
    assert was_reset
    latencies = [output.metrics.first_token_latency for output in outputs if output.metrics is not None]
    return Run(
        seconds=seconds,
        num_requests=len(requests),
        num_prompt_tokens=sum(len(r.prompt_token_ids) for r in requests),
        num_output_tokens=sum(len(c.token_ids) for c in completions),
        num_cached_tokens=sum(output.num_cached_tokens or 0 for output in outputs),
        num_compilations=llm.llm_engine.num_compilations_while_serving - num_compilations,
        mean_first_token_latency=sum(latencies) / len(latencies) if latencies else None,
    )
