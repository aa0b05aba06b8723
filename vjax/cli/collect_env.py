"""`vjax collect-env`: what a bug report needs to say of a machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from vjax import __version__, envs

_PACKAGES = (
    *("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "numpy", "safetensors", "transformers"),
    *("tokenizers", "huggingface-hub", "orbax-checkpoint", "msgspec", "pyzmq", "llguidance", "torch"),
)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "collect-env",
        allow_abbrev=False,
        help="print what a bug report needs to say of this machine",
        description="Prints versions, devices, which kernels would run, settings and the cache. Starts JAX.",
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    found = collect()
    if args.json:
        print(json.dumps(found))
        return 0
    for title, values in found.items():
        print(f"{title}:")
        for name, value in values.items():
            print(f"  {name}: {value}")
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """Section -> name -> value, of this process's machine."""
    return {
        "vjax": {"version": __version__, "folder": str(Path(__file__).parents[1])},
        "system": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
            "nvidia driver": _nvidia_smi("driver_version"),
        },
        "packages": _packages(),
        "devices": _devices(),
        "kernels": _kernels(),
        "environment": envs.relevant(),
        "cache": _cache(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _nvidia_smi(field: str) -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "no nvidia-smi"
    command = [program, f"--query-gpu={field}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return ", ".join(dict.fromkeys(done.stdout.split("\n")[:-1])) or done.stderr.strip() or "unknown"


def _packages() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _devices() -> dict[str, str]:
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as e:
        return {"error": " ".join(str(e).split())}
    found = {}
    for device in devices:
        memory = (device.memory_stats() or {}).get("bytes_limit")
        size = f", {memory / 2**30:.1f} GiB for XLA" if memory else ""
        found[str(device.id)] = f"{device.platform} {device.device_kind}{size}"
    return found


def _kernels() -> dict[str, str]:
    from pallas_kernels import default_implementation

    try:
        return {name: default_implementation(name, 128) for name in ("bfloat16", "float32")}
    except RuntimeError as e:
        return {"error": " ".join(str(e).split())}


def _cache() -> dict[str, Any]:
    folder = envs.cache_dir()
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return {
        "folder": str(folder),
        "used": envs.compile_cache_enabled(),
        "files": len(sizes),
        "size": f"{sum(sizes) / 2**20:.1f} MiB",
    }
