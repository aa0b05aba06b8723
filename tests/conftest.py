"""Tests run on the CPU, with strict dtype promotion, and keep what they compile in a folder of their own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def programs() -> dict[Any, Any]:
    """What the engines of this process compiled while `shared_programs` was in use."""
    return {}


@pytest.fixture(scope="module")
def shared_programs(programs: dict[Any, Any]) -> Iterator[None]:
    """The module's engines run programs that others of their shape compiled: see tests/shared_programs.py."""
    from tests.shared_programs import share

    with pytest.MonkeyPatch.context() as patch:
        share(patch, programs)
        yield
