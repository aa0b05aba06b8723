"""A checkpoint larger than what the process may allocate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

#: What a process may allocate while it loads: the largest leaf (44 MiB) with its tensors, a part of 64 MiB, and some
#: 150 MiB for thread stacks, compilation and imports.
ALLOWED_MIB = 350


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts all private memory on Linux alone")
def test_a_checkpoint_larger_than_the_memory(tmp_path):
    # What malloc keeps for later is not what the loader holds.
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    small_stacks = ["sh", "-c", 'ulimit -s 2048 && exec "$0" "$@"']
    python = [sys.executable, "-W", "error", "-m", "tests.weights.streaming_check", str(tmp_path), str(ALLOWED_MIB)]
    run = subprocess.run(
        small_stacks + python,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **malloc, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found == {"num_bytes": 444633088, "whole_fits": False, "equal": True}
    assert found["num_bytes"] > ALLOWED_MIB << 20
