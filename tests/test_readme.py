"""The README's Python runs as it stands, and the tables of vjax/README.md name every file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_python_block_runs(index, capsys):
    exec(compile(BLOCKS[index], f"README.md[{index}]", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


def test_convert_block_runs(tmp_path):
    (block,) = re.findall(r"```sh\n(vjax convert .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    block = block.replace("vjax convert", "$VJAX convert").replace("vjax generate", "$VJAX generate")
    environment = {**os.environ, "VJAX": f"{sys.executable} -m vjax", "JAX_PLATFORMS": "cpu"}
    command = ["sh", "-c", block.replace("/tmp/", f"{tmp_path}/")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("--- def area("), run.stderr


def test_every_file_is_described():
    text = (ROOT / "vjax" / "README.md").read_text()
    table = text[text.index("## Folders") : text.index("## How to add")]
    missing = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "vjax").rglob("*.py"))
        if not path.name.startswith("__") and f"`{path.name}`" not in table and f"`{path.stem}`" not in table
    ]
    assert missing == []
