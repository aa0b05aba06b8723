"""The shard_map path: two devices, each with half of the heads, give the logits of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.checkpoints import make_checkpoint

pytest.importorskip("torch", reason="Hugging Face in torch is the oracle")


def test_two_devices_agree_with_one(tmp_path):
    path = make_checkpoint("qwen3-tied-biases", tmp_path)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "tests.models.tensor_parallel_check", path]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
