"""Defaults that depend on model, device and mode: dtype, context length and batch limits. Rules as in vLLM, but where a
comment says otherwise."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from vjax.config.scheduler import SchedulingPolicy
from vjax.errors import ConfigError
from vjax.log import info_once, logger, warning_once

DTYPES = ("float32", "bfloat16", "float16")
DTYPE_ALIASES = {"float": "float32", "half": "float16"}
#: Names as in vLLM.
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "bfloat16", "float16")
_FP8 = "float8_e4m3fn"

GIB = 1 << 30
#: From this much memory on, a GPU gets the larger default batch.
LARGE_GPU_BYTES = 70 * GIB

_log = logger("config")


class BatchArgs(Protocol):
    """The fields of `EngineArgs` that the batch limits depend on."""

    enable_chunked_prefill: bool | None
    max_num_batched_tokens: int | None
    max_num_seqs: int | None
    long_prefill_token_threshold: int
    scheduling_policy: SchedulingPolicy
    async_scheduling: bool | None


class BatchLimits(NamedTuple):
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_chunked_prefill: bool


def resolve_dtype(requested: str, checkpoint: str | None, platform: str) -> str:
    """dtype of weights and activations.

    "auto" is float32 on the CPU, where XLA converts 16-bit values at every operation. On a GPU it is the checkpoint's
    dtype, and bfloat16 for float32 checkpoints and those that name none.
    """
    if requested != "auto":
        return DTYPE_ALIASES.get(requested, requested)
    checkpoint = str(checkpoint).removeprefix("torch.") if checkpoint else None
    if platform == "cpu":
        return "float32"
    if checkpoint in ("bfloat16", "float16"):
        return checkpoint
    info_once(_log, f"dtype=auto: the checkpoint is {checkpoint or 'of unnamed dtype'}, computing in bfloat16")
    return "bfloat16"


def resolve_kv_cache_dtype(requested: str, dtype: str) -> str:
    """CacheConfig.cache_dtype. The kernels compute in the dtype of the model, so a 16-bit cache must have it.

    Raises: ConfigError if it has not.
    """
    if requested in ("fp8", "fp8_e4m3"):
        return _FP8
    if requested not in ("auto", dtype):
        raise ConfigError(
            f"kv_cache_dtype={requested!r} does not fit a model of dtype {dtype}; pass 'auto' for {dtype} or 'fp8'.",
            parameter="kv_cache_dtype",
            value=requested,
        )
    return requested


def resolve_max_model_len(requested: int | None, arch: Any) -> int:
    """Raises: ConfigError if more is requested than the model's positions cover."""
    longest = int(arch.max_context_len)
    if requested is None:
        return longest
    if requested > longest:
        raise ConfigError(
            f"max_model_len={requested} is more than the {longest} tokens that the model's positions cover "
            f"(max_position_embeddings={arch.max_position_embeddings} and its rope scaling); "
            f"pass at most {longest} or leave it out.",
            parameter="max_model_len",
            value=requested,
        )
    return requested


def resolve_batch_limits(
    args: BatchArgs, max_model_len: int, platform: str, device_memory_bytes: int | None, use_v1: bool
) -> BatchLimits:
    """Raises: ConfigError if explicit limits contradict each other or the context length."""
    default_tokens, default_seqs = _default_limits(platform, device_memory_bytes, use_v1)
    chunked = use_v1 if args.enable_chunked_prefill is None else args.enable_chunked_prefill
    seqs, tokens = args.max_num_seqs, args.max_num_batched_tokens
    if tokens is None:
        tokens = default_tokens if chunked else max(default_tokens, max_model_len)
        # No step can hold more than every sequence at full length: small models get by with small buckets.
        tokens = max(min(tokens, (seqs or default_seqs) * max_model_len), seqs or default_seqs)
    if seqs is None:
        seqs = min(default_seqs, tokens)
    _check_limits(args, seqs, tokens, max_model_len, chunked)
    return BatchLimits(seqs, tokens, chunked)


def resolve_async_scheduling(requested: bool | None, use_v1: bool) -> bool:
    """Raises: ConfigError if it is asked for in V0."""
    if requested and not use_v1:
        raise ConfigError(
            "async_scheduling=True needs the V1 engine; leave it out, or pass use_v1=True or set VJAX_USE_V1=1.",
            parameter="async_scheduling",
            value=requested,
        )
    return use_v1 if requested is None else requested


def warn_if_slow(dtype: str, platform: str) -> None:
    if platform == "cpu" and dtype != "float32":
        warning_once(_log, f"dtype={dtype} is slow on the CPU, which converts at every operation; float32 is faster")


def _default_limits(platform: str, device_memory_bytes: int | None, use_v1: bool) -> tuple[int, int]:
    """Default max_num_batched_tokens and max_num_seqs."""
    if platform == "cpu":
        return 2048, 64
    if (device_memory_bytes or 0) >= LARGE_GPU_BYTES:
        return 16384, 1024 if use_v1 else 256
    return 8192, 256


def _check_limits(args: BatchArgs, seqs: int, tokens: int, max_model_len: int, chunked: bool) -> None:
    if tokens < seqs:
        raise ConfigError(
            f"max_num_batched_tokens={tokens} is less than max_num_seqs={seqs}, "
            "so that a step could not hold one token of each sequence; raise the one or lower the other.",
            parameter="max_num_batched_tokens",
            value=tokens,
        )
    if not chunked and tokens < max_model_len:
        raise ConfigError(
            f"max_num_batched_tokens={tokens} is less than max_model_len={max_model_len}, so that a long prompt could "
            "not be computed in one step; raise it, lower max_model_len or pass enable_chunked_prefill=True.",
            parameter="max_num_batched_tokens",
            value=tokens,
        )
    threshold = args.long_prefill_token_threshold
    if threshold and not chunked:
        raise ConfigError(
            f"long_prefill_token_threshold={threshold} splits prompts, which enable_chunked_prefill=False forbids; "
            "pass 0 or enable_chunked_prefill=True.",
            parameter="long_prefill_token_threshold",
            value=threshold,
        )
    if threshold > max_model_len:
        raise ConfigError(
            f"long_prefill_token_threshold={threshold} is more than max_model_len={max_model_len}; "
            "lower it, or pass 0 for no limit.",
            parameter="long_prefill_token_threshold",
            value=threshold,
        )
