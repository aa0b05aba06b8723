"""The READMEs' Python runs as it stands, their commands are understood, and vjax/README.md names every file.

A block of Python that cannot run alone is marked: ```python fragment.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vjax.cli.main import build_parser, split_overrides
from vjax.config.file import load_run_file

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "vjax/README.md", "pallas_kernels/README.md")
#: (file, language, text) of every block.
BLOCKS = [
    (name, language, text)
    for name in READMES
    for language, text in re.findall(r"^```(.*)\n((?:.*\n)*?)```$", (ROOT / name).read_text(), re.MULTILINE)
]
PYTHON = [(name, text) for name, language, text in BLOCKS if language == "python"]
COMMANDS = [
    words
    for _, language, text in BLOCKS
    if language in ("sh", "bash")
    for command in re.split(r"&&|\n", text)
    if (words := shlex.split(command, comments=True)) and Path(words[0]).name == "vjax"
]


def test_every_block_says_what_it_is():
    languages = [language for _, language, _ in BLOCKS]
    assert set(languages) <= {"", "bash", "sh", "python", "python fragment"}
    assert [name for name, language, text in BLOCKS if not language and "import " in text] == []
    assert len(PYTHON) == languages.count("python") >= 3 and len(COMMANDS) >= 8


@pytest.mark.parametrize(("name", "block"), PYTHON, ids=[f"{name}-{i}" for i, (name, _) in enumerate(PYTHON)])
def test_python_block_runs(name, block, capsys):
    exec(compile(block, name, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


def test_convert_block_runs(tmp_path):
    (block,) = re.findall(r"```sh\n(vjax convert .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    block = block.replace("vjax convert", "$VJAX convert").replace("vjax generate", "$VJAX generate")
    environment = {**os.environ, "VJAX": f"{sys.executable} -m vjax", "JAX_PLATFORMS": "cpu"}
    command = ["sh", "-c", block.replace("/tmp/", f"{tmp_path}/")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("--- def area("), run.stderr


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command_is_understood(words, monkeypatch):
    """Options and values are what the command takes; run files are read."""
    monkeypatch.chdir(ROOT)
    arguments, overrides = split_overrides(words[1:])
    args = build_parser().parse_args(arguments)
    assert not overrides or args.takes_overrides
    if args.command == "run":
        assert load_run_file(args.file, overrides).prompts


def test_every_file_is_described():
    text = (ROOT / "vjax" / "README.md").read_text()
    table = text[text.index("## Folders") : text.index("## How to add")]
    missing = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "vjax").rglob("*.py"))
        if not path.name.startswith("__") and f"`{path.name}`" not in table and f"`{path.stem}`" not in table
    ]
    assert missing == []
