"""Tests that need an NVIDIA Hopper GPU: `VJAX_TEST_PLATFORM=gpu python -m pytest -m gpu tests/gpu`.

They also run on a CPU (`python -m pytest -m gpu tests/gpu`, minutes), where they prove less: kernels are the `xla` ones
and figures of device memory are sums over live arrays.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.gpu.engines import GPU_MEMORY_UTILIZATION

if os.environ.get("VJAX_TEST_PLATFORM", "cpu") != "cpu":
    # The pool is sized when JAX starts, which may be in the test of another folder.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY_UTILIZATION))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    for item in items:
        if folder in item.path.parents:
            # One pool serves all engines of the process, whatever fraction each asks for.
            item.add_marker(pytest.mark.filterwarnings("ignore:XLA's memory pool was set to"))


@pytest.fixture
def say(capsys):
    """Prints past pytest's capture: figures that belong in the record of a run."""

    def printed(text: str) -> None:
        with capsys.disabled():
            print(text, flush=True)

    return printed
