"""Checkpoints larger than what the process may allocate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

#: What a process may allocate while it loads: the largest leaf (44 MiB) with its tensors, a part of 64 MiB, and some
#: 150 MiB for thread stacks, compilation and imports.
ALLOWED_MIB = 350

#: What it may while it reads a leaf of 128 MiB from Orbax: that one, and some for threads.
ALLOWED_MAPPED_MIB = 192

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts all private memory on Linux alone")


def run_check(module: str, folder: Path, allowed_mib: int) -> dict[str, Any]:
    """What a module of this folder prints as JSON."""
    # What malloc keeps for later is not what the loader holds.
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    small_stacks = ["sh", "-c", 'ulimit -s 2048 && exec "$0" "$@"']
    python = [sys.executable, "-W", "error", "-m", f"tests.weights.{module}", str(folder), str(allowed_mib)]
    run = subprocess.run(
        small_stacks + python,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **malloc, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_checkpoint_larger_than_the_memory(tmp_path):
    found = run_check("streaming_check", tmp_path, ALLOWED_MIB)
    assert found == {"num_bytes": 444633088, "whole_fits": False, "equal": True}
    assert found["num_bytes"] > ALLOWED_MIB << 20


def test_a_leaf_restored_from_orbax_is_on_the_host_once(tmp_path):
    found = run_check("mapped_check", tmp_path, ALLOWED_MAPPED_MIB)
    assert found == {"within_limit": [True], "twice_fits": False, "equal": True}
