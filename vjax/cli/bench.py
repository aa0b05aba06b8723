"""`vjax bench`: benchmarks; each prints one JSON line per result."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("bench", help="measure the engine", description="Benchmarks of the engine.")
    benches = parser.add_subparsers(dest="bench", metavar="BENCH", required=True)
    from vjax.benchmarks import host

    host_parser = benches.add_parser(
        "host",
        help="the host's own work per step",
        description="Median milliseconds that scheduling, packing and updating take per decode step. Needs no GPU.",
    )
    host.add_arguments(host_parser)
    host_parser.set_defaults(handler=_host)


def _host(args: argparse.Namespace) -> int:
    from vjax.benchmarks import host

    return host.run(args)
