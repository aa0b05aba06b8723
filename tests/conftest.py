"""Tests run on the CPU, with strict dtype promotion, and keep what they compile in a folder of their own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

if os.environ.get("VJAX_TEST_PLATFORM", "cpu") == "cpu":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("VJAX_CACHE_DIR", str(Path(tempfile.gettempdir()) / "vjax-test-cache"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_configure(config: pytest.Config) -> None:
    # xdist would start the files of the fewest tests last, and those are the longest ones: compilations and notebooks.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
