"""Results: JSON records that say how they came about, and tables for people."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from vjax import __version__
from vjax.config.engine_args import EngineArgs

if TYPE_CHECKING:
    from vjax.llm import LLM

Record = dict[str, Any]

PERCENTILES = (10, 25, 50, 75, 90, 99)
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "numpy")


def setting(args: EngineArgs, llm: LLM) -> Record:
    """What to know to measure again: engine arguments, what the engine made of them, versions and the device."""
    import jax

    config = llm.llm_engine.config
    device = jax.devices()[0]
    return {
        "engine_args": dataclasses.asdict(args),
        "engine": {
            "use_v1": config.use_v1,
            "dtype": config.model.dtype,
            "max_model_len": config.model.max_model_len,
            "max_num_seqs": config.scheduler.max_num_seqs,
            "max_num_batched_tokens": config.scheduler.max_num_batched_tokens,
            "enable_chunked_prefill": config.scheduler.enable_chunked_prefill,
            "async_scheduling": config.scheduler.async_scheduling,
            "enable_prefix_caching": config.cache.enable_prefix_caching,
            "block_size": config.cache.block_size,
            "num_gpu_blocks": config.cache.num_gpu_blocks,
        },
        "versions": {"vjax": __version__, "python": platform.python_version()} | _installed(),
        "device": {"platform": device.platform, "kind": device.device_kind},
        "host": {"machine": platform.machine(), "cpus": os.cpu_count()},
    }


def caption(record: Record) -> str:
    """What was measured on what, for a picture."""
    engine = record["engine"]
    model, device = record["engine_args"]["model"], record["device"]["kind"]
    return f"vjax {record['versions']['vjax']}: {model}, {engine['dtype']}, {device}"


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Percentile -> value, with the percentile as text, as in vLLM's files."""
    import numpy as np

    return {str(p): float(np.percentile(values, p)) for p in PERCENTILES}


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows (heading -> text) under the headings of the first one; every column as wide as it needs."""
    headings = list(rows[0])
    lines = [headings, *([row[h] for h in headings] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def _installed() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
