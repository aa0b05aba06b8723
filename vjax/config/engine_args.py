"""Arguments of an engine: names, defaults and meaning as in vLLM's `LLM`."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vjax import envs
from vjax.config import checks, vllm_args
from vjax.config.cache import CacheConfig
from vjax.config.engine_config import DEFAULT_MAX_LOGPROBS, EngineConfig, LoadConfig, ModelConfig
from vjax.config.generation import resolve_generation
from vjax.config.pooler import CONVERTS, ENGINE_TASKS, RUNNERS, Pooling, pooler_config
from vjax.config.resolve import (
    DTYPE_ALIASES,
    DTYPES,
    KV_CACHE_DTYPES,
    resolve_async_scheduling,
    resolve_batch_limits,
    resolve_dtype,
    resolve_kv_cache_dtype,
    resolve_max_model_len,
    warn_if_slow,
)
from vjax.config.scheduler import SchedulerConfig, SchedulingPolicy
from vjax.errors import ConfigError
from vjax.log import logger

BLOCK_SIZES = (16, 32, 64, 128)
LOAD_FORMATS = ("auto", "safetensors", "orbax", "dummy")

_log = logger("config")


@dataclass
class EngineArgs:
    """What the user asks for. None means that `resolve` chooses.

    Raises:
        ConfigError: Values are out of their domains; the text names all of them.
    """

    #: Directory, hub id, or "vjax-tiny", the model that comes with the package.
    model: str = "vjax-tiny"
    #: Directory or hub id; None is the model's own.
    tokenizer: str | None = None
    #: Load no tokenizer: prompts are token ids, outputs have no text.
    skip_tokenizer_init: bool = False
    #: "auto", "float32", "bfloat16" or "float16" ("float" and "half" are accepted too).
    dtype: str = "auto"
    #: None: drawn from the system's entropy.
    seed: int | None = 0
    #: Prompt and output tokens of one request together; None is what the model's positions cover.
    max_model_len: int | None = None
    #: "auto" (safetensors if there are any), "safetensors", "orbax" (from `vjax convert`) or "dummy" (random weights).
    load_format: str = "auto"
    revision: str | None = None
    download_dir: str | None = None
    #: "auto": the model's generation_config.json; "vllm": none; else a path.
    generation_config: str = "auto"
    #: Entries that replace those of generation_config.json.
    override_generation_config: dict[str, Any] | None = None
    #: Tokens per KV block: 16, 32, 64 or 128.
    block_size: int = 16
    #: "auto" (the model's dtype; float32 on the CPU), "fp8" or "fp8_e4m3" (half the bytes), "bfloat16" or "float16".
    kv_cache_dtype: str = "auto"
    #: Fraction of the GPU's memory for weights, temporaries and KV together, in (0, 1].
    gpu_memory_utilization: float = 0.92
    #: Bytes for the KV cache; overrides gpu_memory_utilization. None on the CPU means 1 GiB.
    kv_cache_memory_bytes: int | None = None
    #: Number of KV blocks with the null block, whatever the memory says; at least 2.
    num_gpu_blocks_override: int | None = None
    #: None: on in V1, off in V0.
    enable_prefix_caching: bool | None = None
    #: None: on in V1, off in V0.
    enable_chunked_prefill: bool | None = None
    #: Token budget of a step. None: 16384 (GPUs of 70 GiB or more), 8192 (other GPUs), 2048 (CPU); at least
    #: max_model_len without chunked prefill.
    max_num_batched_tokens: int | None = None
    #: Sequences that run at the same time. None: 1024 (V1, GPUs of 70 GiB or more), 256 (other GPUs, V0), 64 (CPU).
    max_num_seqs: int | None = None
    #: Most tokens of one sequence in a step that others want a share of; 0 is no limit.
    long_prefill_token_threshold: int = 0
    #: "fcfs" or "priority".
    scheduling_policy: SchedulingPolicy = "fcfs"
    #: None: on in V1; V0 cannot.
    async_scheduling: bool | None = None
    #: Most log probabilities that a request may ask for with each token; -1: of the whole vocabulary.
    max_logprobs: int = DEFAULT_MAX_LOGPROBS
    #: "raw_logprobs" (of the model's own logits), "processed_logprobs" (of those that the token was drawn from),
    #: "raw_logits" or "processed_logits".
    logprobs_mode: str = "raw_logprobs"
    #: Subclasses of `vjax.LogitsProcessor`, or "module:Class": what requests may do to logits besides.
    logits_processors: list[Any] | None = None
    #: {"reasoning_start_str": ..., "reasoning_end_str": ...}, by default <think> and </think>: what the model writes
    #: around what it thinks. {} is both defaults; None refuses thinking_token_budget. With it, structured_outputs hold
    #: from the end of the reasoning on: behind the first end tag of the output, or from its first token where the last
    #: tag of the prompt is the end tag. A completion without an end tag stays free, as in vLLM. Tags are found as the
    #: tokens that the tokenizer makes of them.
    reasoning_config: dict[str, Any] | None = None
    #: Tokens between two streamed outputs of a request, after its first; requests may ask for more.
    stream_interval: int = 1
    #: Keep no metrics and log no throughput.
    disable_log_stats: bool = True
    #: Folder of the traces that `start_profile` begins; None: the variable VJAX_PROFILER_DIR, else there are none.
    profiler_dir: str | None = None
    #: "generate", or "pooling": prompts become embeddings, classes or scores. "auto": what the model is made for.
    runner: str = "auto"
    #: What "pooling" makes of a model: "embed" (its states are the results), "classify" (its score head's outputs are)
    #: or "reward" (outputs of every token: the score head's, or states where there is none). "none" and "auto": what
    #: the model is made for; one that generates embeds.
    convert: str = "auto"
    #: Former argument for both: "generate", "embed", "classify", "score" or "reward".
    task: str | None = None
    #: What a model that pools makes of the states of a prompt's tokens, see `vjax.PoolerConfig`.
    pooler_config: dict[str, Any] | None = None
    #: pooler_config under its former name.
    override_pooler_config: dict[str, Any] | None = None
    #: None: the variables VJAX_USE_V1, then VLLM_USE_V1, else V1.
    use_v1: bool | None = None

    def __post_init__(self) -> None:
        values, problems = check_fields({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        raise_problems(problems)
        for name, value in values.items():
            setattr(self, name, value)
        self._rename_former_arguments()

    def _rename_former_arguments(self) -> None:
        if self.override_pooler_config is not None:
            if self.pooler_config is not None:
                raise ConfigError(
                    "pooler_config and override_pooler_config are one argument; pass pooler_config alone.",
                    parameter="override_pooler_config",
                    value=self.override_pooler_config,
                )
            self.pooler_config, self.override_pooler_config = self.override_pooler_config, None
        if self.task is not None:
            if (self.runner, self.convert) != ("auto", "auto"):
                raise ConfigError(
                    f"task={self.task!r} stands for runner and convert, and those are given too; leave task out.",
                    parameter="task",
                    value=self.task,
                )
            (self.runner, self.convert), self.task = ENGINE_TASKS[self.task], None

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineArgs:
        """Builds arguments from the keywords of vLLM's `LLM`.

        Those that change nothing here are accepted with one line of log.

        Raises:
            ConfigError: Names are unknown, or values are refused; the text names all of them.
        """
        fields, ignored, problems = split_arguments(kwargs)
        raise_problems(problems)
        if ignored:
            shown = ", ".join(f"{name}={value!r}" for name, value in ignored.items())
            _log.info("accepted without effect: %s", shown)
        return cls(**fields)

    def resolve(
        self,
        arch: Any,
        *,
        platform: str,
        device_memory_bytes: int | None = None,
        hf_config: Mapping[str, Any] | None = None,
        generation_config: Mapping[str, Any] | None = None,
        use_v1: bool | None = None,
        pooling: Pooling | None = None,
    ) -> EngineConfig:
        """Chooses every value that is still open.

        Args:
            arch: Has max_position_embeddings, max_context_len (with rope scaling), torch_dtype and eos_token_ids.
            platform: "cpu" or "gpu".
            device_memory_bytes: Memory of the GPU; None is treated as small.
            hf_config: config.json; its eos_token_id is used where `arch` has none.
            generation_config: Content of the model's generation_config.json, if it has one.
            use_v1: Mode where the argument `use_v1` leaves it open; None asks the environment.
            pooling: What the engine is to make of prompts; None: it generates.

        Raises:
            ConfigError: Arguments contradict each other or the model.
        """
        assert platform in ("cpu", "gpu"), platform
        self.__post_init__()
        if self.use_v1 is not None:
            use_v1 = self.use_v1
        elif use_v1 is None:
            use_v1 = envs.use_v1()
        model = self._resolve_model(arch, platform, hf_config or {}, generation_config)
        if pooling is not None:
            self._check_pooling()
            model = dataclasses.replace(model, pooling=pooling)
        limits = resolve_batch_limits(self, model.max_model_len, platform, device_memory_bytes, use_v1)
        caching = use_v1 if self.enable_prefix_caching is None else self.enable_prefix_caching
        return EngineConfig(
            model=model,
            cache=CacheConfig(
                block_size=self.block_size,
                cache_dtype=resolve_kv_cache_dtype(self.kv_cache_dtype, model.dtype),
                gpu_memory_utilization=self.gpu_memory_utilization,
                kv_cache_memory_bytes=self.kv_cache_memory_bytes,
                num_gpu_blocks_override=self.num_gpu_blocks_override,
                enable_prefix_caching=caching,
            ),
            scheduler=SchedulerConfig(
                max_num_seqs=limits.max_num_seqs,
                max_num_batched_tokens=limits.max_num_batched_tokens,
                max_model_len=model.max_model_len,
                enable_chunked_prefill=limits.enable_chunked_prefill,
                long_prefill_token_threshold=self.long_prefill_token_threshold,
                policy=self.scheduling_policy,
                async_scheduling=resolve_async_scheduling(self.async_scheduling, use_v1),
                static_batch=not use_v1,
                pools=pooling is not None,
            ),
            load=LoadConfig(self.load_format, self.revision, self.download_dir),
            stream_interval=self.stream_interval,
            disable_log_stats=self.disable_log_stats,
            profiler_dir=self.profiler_dir or envs.profiler_dir(),
            use_v1=use_v1,
        )

    def _check_pooling(self) -> None:
        for name in ("logits_processors", "reasoning_config"):
            if getattr(self, name):
                raise ConfigError(
                    f"{name} is for text generation, and this engine pools; leave it out, or pass runner='generate'.",
                    parameter=name,
                    value=getattr(self, name),
                )

    def _resolve_model(
        self, arch: Any, platform: str, hf_config: Mapping[str, Any], generation_config: Mapping[str, Any] | None
    ) -> ModelConfig:
        dtype = resolve_dtype(self.dtype, arch.torch_dtype, platform)
        warn_if_slow(dtype, platform)
        defaults = resolve_generation(
            self.generation_config, self.override_generation_config, generation_config, _eos_token_ids(arch, hf_config)
        )
        return ModelConfig(
            model=self.model,
            tokenizer=self.tokenizer or self.model,
            skip_tokenizer_init=self.skip_tokenizer_init,
            dtype=dtype,
            seed=secrets.randbits(31) if self.seed is None else self.seed,
            max_model_len=resolve_max_model_len(self.max_model_len, arch),
            default_sampling_params=defaults.sampling_params,
            generation_eos_token_ids=defaults.eos_token_ids,
            max_logprobs=self.max_logprobs,
            logprobs_mode=self.logprobs_mode,
            logits_processors=tuple(self.logits_processors or ()),
            thinking_tags=_thinking_tags(self.reasoning_config),
        )


@dataclass
class AsyncEngineArgs(EngineArgs):
    """Arguments of `AsyncLLM`: as `EngineArgs`, but metrics are kept unless they are switched off, as in vLLM."""

    disable_log_stats: bool = False


def _eos_token_ids(arch: Any, hf_config: Mapping[str, Any]) -> tuple[int, ...]:
    ids = arch.eos_token_ids
    if not ids:
        value = hf_config.get("eos_token_id")
        ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return tuple(ids)


_dtype_name = checks.choice("auto", *DTYPES, *DTYPE_ALIASES)
_length = checks.integer(2)
_task = checks.choice(*ENGINE_TASKS)


def _dtype(value: Any) -> str:
    """Accepts a name or anything that has one, such as jnp.bfloat16, np.float32 or torch.bfloat16."""
    named = value if isinstance(value, str) else getattr(value, "name", None) or getattr(value, "__name__", None)
    return _dtype_name(str(named or value).removeprefix("torch."))


def _max_model_len(value: Any) -> int:
    if value in (-1, "auto"):
        raise checks.Refused("is not supported: the length is not fitted to the memory; pass a number or leave it out")
    return _length(value)


def _logits_processors(value: Any) -> list[Any]:
    good = isinstance(value, (list, tuple)) and all(isinstance(v, type) or (type(v) is str and ":" in v) for v in value)
    if not good:
        raise checks.Refused('must be a list of subclasses of vjax.LogitsProcessor or of "module:Class"')
    return list(value)


#: Keys of reasoning_config and their defaults.
_TAGS = {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}


def _reasoning_config(value: Any) -> dict[str, str]:
    config = checks.mapping(value)
    if not set(config) <= set(_TAGS) or not all(isinstance(text, str) and text for text in config.values()):
        raise checks.Refused(f"must have no keys but {' and '.join(_TAGS)}, each a text that is not empty")
    return config


def _thinking_tags(config: Mapping[str, str] | None) -> tuple[str, str] | None:
    if config is None:
        return None
    tags = {**_TAGS, **config}
    return tags["reasoning_start_str"], tags["reasoning_end_str"]


_optional_bool = checks.optional(checks.boolean)
_optional_count = checks.optional(checks.integer(1))

#: Field of EngineArgs -> its check.
CHECKS: dict[str, checks.Check] = {
    "model": checks.path,
    "tokenizer": checks.optional(checks.path),
    "skip_tokenizer_init": checks.boolean,
    "dtype": checks.Check(_dtype, _dtype_name.schema),
    "seed": checks.optional(checks.integer(0, 2**63 - 1)),
    "max_model_len": checks.optional(checks.Check(_max_model_len, _length.schema)),
    "load_format": checks.choice(*LOAD_FORMATS),
    "revision": checks.optional(checks.text),
    "download_dir": checks.optional(checks.path),
    "generation_config": checks.path,
    "override_generation_config": checks.optional(checks.mapping),
    "block_size": checks.choice(*BLOCK_SIZES),
    "kv_cache_dtype": checks.choice(*KV_CACHE_DTYPES),
    "gpu_memory_utilization": checks.fraction,
    "kv_cache_memory_bytes": _optional_count,
    "num_gpu_blocks_override": checks.optional(checks.integer(2)),
    "enable_prefix_caching": _optional_bool,
    "enable_chunked_prefill": _optional_bool,
    "max_num_batched_tokens": _optional_count,
    "max_num_seqs": _optional_count,
    "long_prefill_token_threshold": checks.integer(0),
    "scheduling_policy": checks.choice("fcfs", "priority"),
    "async_scheduling": _optional_bool,
    "max_logprobs": checks.integer(-1),
    "logprobs_mode": checks.choice("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"),
    "logits_processors": checks.optional(
        checks.Check(_logits_processors, {"type": "array", "items": {"type": "string", "pattern": ":"}})
    ),
    "reasoning_config": checks.optional(
        checks.Check(
            _reasoning_config,
            {
                "type": "object",
                "additionalProperties": False,
                "properties": dict.fromkeys(_TAGS, checks.text.schema),
            },
        )
    ),
    "stream_interval": checks.integer(1),
    "disable_log_stats": checks.boolean,
    "profiler_dir": checks.optional(checks.path),
    "runner": checks.choice(*RUNNERS),
    "convert": checks.choice(*CONVERTS),
    "task": checks.Check(
        lambda value: None if value is None else _task(value), {"enum": [*_task.schema["enum"], None]}
    ),
    "pooler_config": checks.optional(pooler_config),
    "override_pooler_config": checks.optional(pooler_config),
    "use_v1": _optional_bool,
}


def split_arguments(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Sorts keywords into fields of EngineArgs (converted), vLLM arguments without effect, and problems by name."""
    ignored: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for name, value in kwargs.items():
        if name in CHECKS:
            continue
        if name not in vllm_args.KNOWN:
            problems[name] = f"unknown argument {name!r}: {checks.did_you_mean(name, _by_relevance())}"
        elif reason := vllm_args.refusal(name, value):
            problems[name] = f"{name}={value!r} {reason}"
        else:
            ignored[name] = value
    fields, refused = check_fields({name: value for name, value in kwargs.items() if name in CHECKS})
    return fields, ignored, problems | refused


def check_fields(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Converted values, and problems by name."""
    good: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for name, value in values.items():
        try:
            good[name] = CHECKS[name](value)
        except checks.Refused as e:
            problems[name] = f"{name}={value!r} {e}"
    return good, problems


def raise_problems(problems: Mapping[str, str]) -> None:
    """Raises: ConfigError that lists the problems, if there are any."""
    if not problems:
        return
    text = "; ".join(problems.values())
    raise ConfigError(
        text if text.endswith("?") else f"{text}.", parameter=next(iter(problems)) if len(problems) == 1 else None
    )


def _by_relevance() -> list[str]:
    return [*CHECKS, *sorted(vllm_args.KNOWN)]
