"""The engine's configuration with every default resolved: what `EngineArgs.resolve` returns. Immutable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vjax.config.cache import CacheConfig
from vjax.config.pooler import Pooling
from vjax.config.scheduler import SchedulerConfig

DEFAULT_MAX_LOGPROBS = 20


@dataclass(frozen=True)
class ModelConfig:
    #: Directory, hub id or name of a bundled model, as the user gave it.
    model: str
    #: Directory or hub id of the tokenizer; the model's own by default.
    tokenizer: str
    #: No tokenizer is loaded: prompts are token ids, outputs have no text.
    skip_tokenizer_init: bool
    #: Of weights and activations: "float32", "bfloat16" or "float16".
    dtype: str
    #: Seeds what is drawn for requests without a seed of their own, and dummy weights.
    seed: int
    #: Prompt and output tokens of one request together.
    max_model_len: int
    #: SamplingParams fields that generation_config.json sets; used when a call passes no sampling parameters.
    default_sampling_params: Mapping[str, Any] = field(default_factory=dict)
    #: Every id that ends a sequence according to generation_config.json (config.json where it names none), in file
    #: order; empty with generation_config="vllm". Those besides the tokenizer's own EOS act like `stop_token_ids`.
    generation_eos_token_ids: tuple[int, ...] = ()
    #: Most log probabilities that a request may ask for with each token; -1: of the whole vocabulary.
    max_logprobs: int = DEFAULT_MAX_LOGPROBS
    #: Of what they are: "raw_logprobs", "raw_logits" (before anything is done to the logits), "processed_logprobs" or
    #: "processed_logits" (what the token was drawn from).
    logprobs_mode: str = "raw_logprobs"
    #: The user's classes of logits processors, or "module:Class", in the order in which they are applied.
    logits_processors: tuple[Any, ...] = ()
    #: Texts that begin and end what a model thinks; None: thinking_token_budget is refused.
    thinking_tags: tuple[str, str] | None = None
    #: What becomes of prompts; None: the engine generates.
    pooling: Pooling | None = None


@dataclass(frozen=True)
class LoadConfig:
    #: "auto", "safetensors", "orbax" or "dummy", see `vjax.weights.manifest.stored_format`.
    load_format: str = "auto"
    #: Branch, tag or commit on the hub; None is the default branch.
    revision: str | None = None
    #: Folder for downloads; None is huggingface_hub's cache.
    download_dir: str | None = None


@dataclass(frozen=True)
class EngineConfig:
    model: ModelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    load: LoadConfig
    #: True: no metrics, no throughput line, `RequestOutput.metrics` is None.
    disable_log_stats: bool
    #: True: V1 engine; False: V0.
    use_v1: bool
    #: Least number of tokens between two streamed outputs of a request, after its first.
    stream_interval: int = 1
    #: Folder of traces; None: none are written.
    profiler_dir: str | None = None
