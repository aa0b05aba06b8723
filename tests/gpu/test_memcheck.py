"""compute-sanitizer's memcheck on one case of each kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.memcheck_cases import CASES, PLANTED

SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not os.access(SANITIZER, os.X_OK), reason="compute-sanitizer is not installed"),
]


def memcheck(*cases: str) -> str:
    """What the checker prints. Only with cuda_async is each buffer an allocation of its own and of its true size."""
    environment = {
        **os.environ,
        "XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_FLAGS": "",
    }
    program = [sys.executable, str(Path(__file__).with_name("memcheck_cases.py")), *cases]
    done = subprocess.run(
        [SANITIZER, "--tool", "memcheck", *program], env=environment, capture_output=True, text=True, timeout=500
    )
    text = done.stdout + done.stderr
    if "Device not supported" in text:
        pytest.skip("compute-sanitizer does not support this device here")
    return text


@pytest.mark.parametrize("case", PLANTED)
def test_planted_overruns_are_reported(case: str):
    """A checker that misses them would prove nothing by its silence. TMA stays inside its array by itself."""
    kind = case.removeprefix("overrun_")
    text = memcheck(case)
    assert f"Invalid __global__ {kind}" in text, text[-3000:]


def test_kernels_stay_inside_their_buffers():
    text = memcheck(*CASES)
    assert [line.split()[1] for line in text.splitlines() if line.startswith("ran ")] == list(CASES), text[-3000:]
    assert "ERROR SUMMARY: 0 errors" in text, text[-3000:]
