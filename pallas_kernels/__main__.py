"""`python -m pallas_kernels bench|tune|check OP`: times, tunes and checks the kernels on the default device."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from pallas_kernels.bench import commands
from pallas_kernels.implementation import IMPLEMENTATIONS, MOSAIC_GPU, XLA


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 1 when a check fails."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels", description=__doc__)
    parser.add_argument("command", choices=("bench", "tune", "check"))
    parser.add_argument("op", choices=(*commands.OPS, "all"))
    parser.add_argument("--case", default="", help="only cases whose name holds this")
    parser.add_argument("--implementation", action="append", choices=IMPLEMENTATIONS, help="check: which (repeatable)")
    parser.add_argument("--json", type=Path, help="bench: also write the figures to this file")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    ops = list(commands.OPS.values()) if options.op == "all" else [commands.OPS[options.op]]
    failures, records = 0, []
    for op in ops:
        if options.command == "bench":
            records += commands.bench(op, options.case, _say)
        elif options.command == "tune":
            commands.tune(op, options.case, _say)
        else:
            failures += commands.check(op, options.case, options.implementation or _on_this_device(), _say)
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=1))
    return 1 if failures else 0


def _on_this_device() -> list[str]:
    from pallas_kernels.implementation import default_implementation

    return [XLA, MOSAIC_GPU] if default_implementation("bfloat16", 128) == MOSAIC_GPU else [XLA]


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
