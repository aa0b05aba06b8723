"""The command `vjax`, run in the process of the tests."""

from __future__ import annotations

import pytest

from vjax.cli.main import main

_LOG = ("INFO ", "WARNING ", "ERROR ")


@pytest.fixture
def vjax(capsys):
    """Runs a command: (exit code, stdout, stderr without the log)."""

    def run(*arguments: object) -> tuple[object, str, str]:
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as e:  # argparse
            code = e.code
        out, err = capsys.readouterr()
        return code, out, "".join(line for line in err.splitlines(True) if not line.startswith(_LOG))

    return run
