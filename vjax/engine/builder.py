"""Builds an engine core from arguments: config, weights, KV cache, executables. Runs once per engine."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from tqdm import tqdm

from pallas_kernels import default_implementation, padded_head_dim
from vjax import envs
from vjax.config.engine_args import EngineArgs
from vjax.config.engine_config import DEFAULT_MAX_LOGPROBS, EngineConfig
from vjax.config.generation import read_generation_config
from vjax.engine.core import EngineCore
from vjax.engine.grammars import make_compiler
from vjax.engine.profiler import Profiler
from vjax.engine.protocol import EngineInfo
from vjax.errors import ConfigError
from vjax.log import logger
from vjax.logits_processor import make_processors
from vjax.models.arch import ArchConfig
from vjax.models.functional import build_model
from vjax.models.pooling import resolve_model
from vjax.models.registry import is_registered, read_hf_config
from vjax.parallel.sharding import make_mesh
from vjax.runner import memory, platform
from vjax.runner.buckets import Buckets
from vjax.runner.executables import Executables
from vjax.runner.exported import StepDescription
from vjax.runner.lowered import LoweredPrograms
from vjax.runner.lowered_cache import LoweredCache
from vjax.runner.pooling_runner import PoolingRunner
from vjax.runner.runner import ModelRunner
from vjax.runner.step import Step, StepGeometry
from vjax.scheduler.factory import make_scheduler
from vjax.structured.reasoning import ReasoningTags
from vjax.text.load import load_tokenizer
from vjax.text.tokenizer import Tokenizer
from vjax.weights.hub import resolve_model_path
from vjax.weights.kv_scales import read_kv_scales
from vjax.weights.loader import load_weights

log = logger(__name__)

#: KV cache dtypes for which a checkpoint may have scales.
_QUANTISED = ("float8_e4m3fn",)


@dataclass(frozen=True)
class BuiltEngine:
    """What the front end needs to know of a built engine."""

    core: EngineCore
    config: EngineConfig
    arch: ArchConfig
    #: None with skip_tokenizer_init, and where it was not asked for.
    tokenizer: Tokenizer | None

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(self.config, self.arch.vocab_size, tuple(self.arch.eos_token_ids))


def build_engine(args: EngineArgs, *, with_tokenizer: bool = True) -> BuiltEngine:
    """Loads a model and prepares everything that serving needs.

    Args:
        with_tokenizer: False leaves the tokenizer to a front end in another process.

    Raises:
        ConfigError: An argument cannot be used with this model or device.
        ModelLoadError: The checkpoint cannot be read or is not supported.
        OutOfMemoryError: Weights or KV cache do not fit.
    """
    started = time.perf_counter()
    use_v1 = envs.use_v1() if args.use_v1 is None else args.use_v1
    model_dir = resolve_model_path(args.model, revision=args.revision, download_dir=args.download_dir)
    hf_config = read_hf_config(model_dir)
    arch, pooling = resolve_model(
        hf_config, model_dir, runner=args.runner, convert=args.convert, pooler_config=args.pooler_config
    )
    generation_config = None
    if args.generation_config == "auto" and (model_dir / "generation_config.json").is_file():
        generation_config = read_generation_config(model_dir)

    # Before the minutes that weights and compilation take: a bad tokenizer is found at once.
    def load() -> Tokenizer | None:
        if args.skip_tokenizer_init:
            return None
        return load_tokenizer(
            args.tokenizer, model_dir=model_dir, revision=args.revision, download_dir=args.download_dir
        )

    tokenizer = load() if with_tokenizer or args.reasoning_config is not None else None
    device = platform.configure(args.gpu_memory_utilization)
    kind = platform.platform_name(device)
    device_memory = (device.memory_stats() or {}).get("bytes_limit", 0) if kind == "gpu" else 0
    config = args.resolve(
        arch,
        platform=kind,
        device_memory_bytes=device_memory,
        hf_config=hf_config,
        generation_config=generation_config,
        use_v1=use_v1,
        pooling=pooling,
    )
    thinking = _thinking_ids(config.model.thinking_tags, tokenizer)
    runner, config = build_runner(config, arch, model_dir, device, thinking=thinking)
    grammars = make_compiler(
        load if tokenizer is None else lambda: tokenizer,
        config,
        vocab_size=arch.vocab_size,
        model_eos_token_ids=arch.eos_token_ids,
        tags=None if thinking is None else ReasoningTags(*thinking),
    )
    core = EngineCore(
        make_scheduler(config.scheduler, config.cache),
        runner,
        async_scheduling=config.scheduler.async_scheduling,
        profiler=Profiler(config.profiler_dir),
        grammars=grammars,
    )
    log.info(
        "engine ready in %.1f s: %s, %s, %s mode, %d KV blocks of %d tokens",
        time.perf_counter() - started,
        args.model,
        config.model.dtype,
        "V1" if use_v1 else "V0",
        config.cache.num_gpu_blocks,
        config.cache.block_size,
    )
    return BuiltEngine(core, config, arch, tokenizer)


def build_runner(
    config: EngineConfig,
    arch: ArchConfig,
    model_dir: Path,
    device: Any,
    *,
    thinking: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
) -> tuple[ModelRunner, EngineConfig]:
    """Weights, executables and KV cache on `device`; returns the config with num_gpu_blocks filled in.

    Args:
        thinking: Token ids that begin and end reasoning.

    When it fails, nothing stays on the device, however long the traceback lives.
    """
    kind = platform.platform_name(device)
    mesh = make_mesh([device])
    processors = make_processors(config.model.logits_processors)
    given = {}
    if config.cache.cache_dtype in _QUANTISED:
        scales = read_kv_scales(model_dir, arch, config.load.load_format) or {}
        given = {f"vectors.{name}": scale for name, scale in scales.items()}
    model = build_model(arch, jnp.dtype(config.model.dtype), mesh=mesh, kv_scales=bool(given))
    memory.check_weights_fit(model.leaf_specs.values(), config, device)
    geometry = step_geometry(config, arch, memory.num_bytes(model.leaf_specs.values()), device)
    config = replace(config, cache=replace(config.cache, num_gpu_blocks=geometry.num_blocks))
    buckets = Buckets.build(
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_num_seqs=config.scheduler.max_num_seqs,
        platform=kind,
        pools=arch.pools,
        num_layers=arch.num_layers if kind == "gpu" else 0,
    )
    step = Step(model, geometry, processors, thinking)
    step.check_logits_processors()
    executables = Executables(step, buckets, mesh, kind)

    started = time.perf_counter()
    load = functools.partial(
        load_weights,
        model,
        model_dir,
        mesh=mesh,
        load_format=config.load.load_format,
        seed=config.model.seed,
        given=given,
    )
    with _lowered_elsewhere(executables) as lowered:
        leaves = load()
        try:
            return _start_runner(config, executables, leaves, load, device, lowered, started), config
        except BaseException:
            for leaf in leaves:
                leaf.delete()
            raise


def step_geometry(config: EngineConfig, arch: ArchConfig, weight_bytes: int, device: Any) -> StepGeometry:
    """Sizes of the step on `device`: KV blocks get what weights of `weight_bytes`, still to be loaded, will leave.

    Raises:
        OutOfMemoryError: See `memory.num_kv_blocks`.
    """
    kv_dtype = _kv_dtype(config, platform.platform_name(device))
    implementation = default_implementation(kv_dtype, arch.head_dim)
    kv_head_dim = padded_head_dim(arch.head_dim, implementation)
    num_blocks = memory.num_kv_blocks(
        config,
        arch,
        kv_head_dim=kv_head_dim,
        kv_itemsize=kv_dtype.itemsize,
        itemsize=jnp.dtype(config.model.dtype).itemsize,
        weight_bytes=weight_bytes,
        device=device,
    )
    return StepGeometry(
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_blocks_per_row=-(-config.model.max_model_len // config.cache.block_size),
        kv_head_dim=kv_head_dim,
        kv_dtype=kv_dtype.name,
        implementation=implementation,
        # Of the whole vocabulary has a program of its own.
        max_logprobs=DEFAULT_MAX_LOGPROBS if config.model.max_logprobs == -1 else config.model.max_logprobs,
        logprobs_mode=config.model.logprobs_mode,
    )


def _thinking_ids(
    tags: tuple[str, str] | None, tokenizer: Tokenizer | None
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The token ids of the texts around reasoning."""
    if tags is None:
        return None
    if tokenizer is None:
        raise ConfigError(
            "reasoning_config needs a tokenizer; leave out skip_tokenizer_init.", parameter="reasoning_config"
        )
    start, end = (tuple(tokenizer.encode(tag, add_special_tokens=False)) for tag in tags)
    if not start or not end:
        raise ConfigError(f"reasoning_config: the tokenizer has no tokens for {tags}.", parameter="reasoning_config")
    return start, end


def _kv_dtype(config: EngineConfig, kind: str) -> jnp.dtype:
    if config.cache.cache_dtype != "auto":
        return jnp.dtype(config.cache.cache_dtype)
    # XLA's CPU backend converts a whole bfloat16 cache to float32 and back around a scatter.
    return jnp.dtype(jnp.float32 if kind == "cpu" else config.model.dtype)


def _lowered_elsewhere(executables: Executables) -> AbstractContextManager[LoweredPrograms | None]:
    """Has other processes lower what is not on disk. None on the CPU, where programs are compiled when they are needed;
    for several devices, whose placement an exported program would have to carry; and for a user's model, which other
    processes do not know and whose sources do not count in the names on disk."""
    registered = is_registered(executables.step.model.arch.architecture)
    if executables.platform != "gpu" or executables.mesh.size > 1 or registered:
        return nullcontext()
    description = StepDescription.of(executables.step, executables.mesh, "cuda")
    cache = LoweredCache(platform.lowered_cache_dir(), repr(description)) if envs.compile_cache_enabled() else None
    return LoweredPrograms(description, executables.all_keys(), cache)


def _start_runner(
    config: EngineConfig,
    executables: Executables,
    leaves: tuple,
    load: Callable[[], tuple],
    device: Any,
    lowered: LoweredPrograms | None,
    started: float,
) -> ModelRunner:
    """On a GPU compiles and runs every program: before the KV cache takes the memory that GEMM autotuning works in, and
    after the weights, because scratch among them would leave holes that no array of the cache fits.

    Args:
        load: Makes the leaves again.
        started: When weights began to be loaded, by `time.perf_counter`, for the log.
    """
    runner_class = PoolingRunner if executables.step.model.arch.pools else ModelRunner
    if executables.platform != "gpu":
        return runner_class(leaves, executables, load)
    loaded = time.perf_counter()
    executables.compile_all(
        progress=_compile_progress,
        exported=lowered.get if lowered is not None else None,
        # What had to be lowered is not in XLA's cache either.
        kernels_first=lowered is not None and lowered.num_workers > 0,
        num_threads=memory.compile_threads(device),
    )
    itemsize = jnp.dtype(config.model.dtype).itemsize
    compiled_all = (compiled for _, compiled in executables.ready())
    memory.check_temporaries(compiled_all, executables.step.model.arch, config, itemsize)
    compiled = time.perf_counter()
    with memory.room_for_small_arrays(device) as walls:
        runner = runner_class(leaves, executables, load)
    runner.walls = walls
    runner.warm_up()
    log.info(
        "start: weights %.1f s, then programs %.1f s (%s), KV cache and warm-up %.1f s",
        loaded - started,
        compiled - loaded,
        "lowered here" if lowered is None else lowered.summary(),
        time.perf_counter() - compiled,
    )
    return runner


def _compile_progress(keys: Iterable, total: int, doing: str) -> Iterable:
    return tqdm(keys, desc=doing, unit="program", total=total, disable=None)
