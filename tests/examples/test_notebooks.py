"""Each notebook runs without an error, and says what it is committed to say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="the notebooks need the extra `notebooks`: nbclient is not installed")
pytest.importorskip("nbformat", reason="the notebooks need the extra `notebooks`: nbformat is not installed")
pytest.importorskip("ipykernel", reason="the notebooks need the extra `notebooks`: ipykernel is not installed")
pytest.importorskip("matplotlib", reason="the notebooks need the extra `notebooks`: matplotlib is not installed")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "notebooks"))

import execute

FOLDER = execute.HERE
#: Notebook -> lines among its outputs, none of which depends on the machine, and its number of pictures.
EXPECTED: dict[str, tuple[list[str], int]] = {
    "quickstart": (
        ["--- 3 tokens in, 24 out: length", "the same again: True", "def stop(self):"],
        0,
    ),
    "v0_to_v1": (
        [
            "engine: vjax.v1.engine.llm_engine",
            "24 prompt tokens, 16 of them from the cache",
            "the same tokens in both modes: True",
            "batch: V0, static batches: True, prefix caching: False, chunked prefill: False",
            "53 prompt tokens, 32 from the cache",
            "64 of 147 tokens found: 44%",
        ],
        2,
    ),
    "prefix_caching": (
        [
            "from the cache: [0, 160, 160, 160, 160, 160]",
            "blocks in the tables: 44 - blocks in memory: 14",
            "salt alice: 160 tokens found",
            "salt bob: 0 tokens found",
            "A: 174 tokens, 11 blocks, 80 tokens found",
        ],
        4,
    ),
    "inside_the_step": (
        [
            "6 {'area': 1, 'long': 24, 'add': 7, 'open': 5}",
            "block table of area: [1, 3, 4, 19, 18]",
        ],
        3,
    ),
}


def check(name, notebook):
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    printed = "".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream").splitlines()
    lines, num_pictures = EXPECTED[name]
    assert [line for line in lines if line not in printed] == []
    assert sum("image/png" in o.get("data", {}) for o in outputs) == num_pictures


def test_every_notebook_is_expected():
    assert sorted(EXPECTED) == sorted(execute.NAMES) == sorted(path.stem for path in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", EXPECTED)
def test_committed_outputs(name):
    text = (FOLDER / f"{name}.ipynb").read_text()
    check(name, json.loads(text))
    assert not [part for part in ("/home/", "/tmp/", "/Users/", str(FOLDER)) if part in text]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # of Jupyter's own modules
@pytest.mark.parametrize("name", EXPECTED)
def test_notebook_runs(name, tmp_path):
    execute.execute(FOLDER / f"{name}.ipynb", tmp_path / f"{name}.ipynb")
    check(name, json.loads((tmp_path / f"{name}.ipynb").read_text()))
