"""Builds an engine core from arguments: config, weights, KV cache, executables. Runs once per engine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from tqdm import tqdm

from pallas_kernels import default_implementation, padded_head_dim
from vjax import envs
from vjax.config.engine_args import EngineArgs
from vjax.config.engine_config import EngineConfig
from vjax.engine.core import EngineCore
from vjax.log import logger
from vjax.models.arch import ArchConfig
from vjax.models.functional import build_model
from vjax.models.registry import arch_config_from_hf, read_hf_config
from vjax.parallel.sharding import make_mesh
from vjax.runner import memory, platform
from vjax.runner.buckets import Buckets
from vjax.runner.executables import Executables
from vjax.runner.runner import ModelRunner
from vjax.runner.step import Step, StepGeometry
from vjax.scheduler.factory import make_scheduler
from vjax.weights.hub import resolve_model_path
from vjax.weights.loader import load_weights

log = logger(__name__)


@dataclass(frozen=True)
class BuiltEngine:
    """What the front end needs to know of a built engine."""

    core: EngineCore
    config: EngineConfig
    arch: ArchConfig
    model_dir: Path


def build_engine(args: EngineArgs) -> BuiltEngine:
    """Loads a model and prepares everything that serving needs.

    Raises:
        ConfigError: An argument cannot be used with this model or device.
        ModelLoadError: The checkpoint cannot be read or is not supported.
        OutOfMemoryError: Weights or KV cache do not fit.
    """
    started = time.perf_counter()
    use_v1 = envs.use_v1() if args.use_v1 is None else args.use_v1
    model_dir = resolve_model_path(args.model, revision=args.revision, download_dir=args.download_dir)
    hf_config = read_hf_config(model_dir)
    arch = arch_config_from_hf(hf_config)
    generation_config = read_generation_config(model_dir, args.generation_config)
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
    )
    runner, config = build_runner(config, arch, model_dir, device)
    core = EngineCore(
        make_scheduler(config.scheduler, config.cache), runner, async_scheduling=config.scheduler.async_scheduling
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
    return BuiltEngine(core, config, arch, model_dir)


def build_runner(
    config: EngineConfig, arch: ArchConfig, model_dir: Path, device: Any
) -> tuple[ModelRunner, EngineConfig]:
    """Weights, executables and KV cache on `device`; returns the config with num_gpu_blocks filled in."""
    kind = platform.platform_name(device)
    mesh = make_mesh([device])
    dtype = jnp.dtype(config.model.dtype)
    # XLA's CPU backend converts a whole bfloat16 cache to float32 and back around a scatter.
    kv_dtype = jnp.dtype(jnp.float32) if kind == "cpu" else dtype
    implementation = default_implementation(kv_dtype, arch.head_dim)
    kv_head_dim = padded_head_dim(arch.head_dim, implementation)

    model = build_model(arch, dtype, mesh=mesh)
    leaves = load_weights(model, model_dir, mesh=mesh, load_format=config.load.load_format, seed=config.model.seed)
    num_blocks = memory.num_kv_blocks(
        config, arch, kv_head_dim=kv_head_dim, kv_itemsize=kv_dtype.itemsize, device=device
    )
    config = replace(config, cache=replace(config.cache, num_gpu_blocks=num_blocks))
    geometry = StepGeometry(
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_blocks_per_row=-(-config.model.max_model_len // config.cache.block_size),
        kv_head_dim=kv_head_dim,
        kv_dtype=kv_dtype.name,
        implementation=implementation,
    )
    buckets = Buckets.build(
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_num_seqs=config.scheduler.max_num_seqs,
        platform=kind,
    )
    executables = Executables(Step(model, geometry), buckets, mesh, kind)
    if kind == "gpu":  # before the KV cache takes the memory that GEMM autotuning works in
        executables.compile_all(executables.covering_keys(), _compile_progress)
        memory.check_temporaries(executables.get_ready(buckets.mixed[-1]), arch, config, dtype.itemsize)
    runner = ModelRunner(leaves, executables)
    if kind == "gpu":
        runner.warm_up()
        executables.compile_in_background()
    return runner, config


def _compile_progress(keys: Iterable, total: int) -> Iterable:
    return tqdm(keys, desc="Compiling", unit="program", total=total, disable=None)


def read_generation_config(model_dir: Path, source: str) -> dict[str, Any]:
    """generation_config.json of the model ("auto"), of another folder, or {} ("vllm")."""
    if source == "vllm":
        return {}
    path = (model_dir if source == "auto" else Path(source)) / "generation_config.json"
    return json.loads(path.read_text()) if path.is_file() else {}
