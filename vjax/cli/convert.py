"""`vjax convert`: a model's weights in another format, in a folder of their own."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

_FORMATS = ("orbax", "safetensors")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        allow_abbrev=False,
        help="write a model's weights as Orbax or as safetensors",
        description=(
            "Reads MODEL and writes the folder OUTPUT: config, tokenizer and other files as they are, the weights in "
            "the format asked for. OUTPUT loads like any model (--model OUTPUT) and gives the same parameters, bit for "
            "bit. orbax holds them as the engine keeps them on its devices: each device reads its own share, and "
            "nothing is rearranged while loading. safetensors has Hugging Face's names and shapes. Runs on the CPU, in "
            "little memory."
        ),
        epilog=(
            "Example: vjax convert vjax-tiny tiny-orbax --to orbax && vjax generate --model tiny-orbax 'def f('. "
            "Exit codes: 0 done, 1 OUTPUT cannot be written, 2 MODEL cannot be read or OUTPUT is in use. OUTPUT "
            "appears when it is complete; what fails leaves nothing behind."
        ),
    )
    parser.add_argument("model", metavar="MODEL", help="folder, hub id or vjax-tiny")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="the folder to make")
    parser.add_argument("--to", choices=_FORMATS, required=True, help="format of the weights in OUTPUT")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it is a model folder")
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")  # a GPU's memory stays free
    from vjax.weights.convert import convert_model
    from vjax.weights.hub import resolve_model_path

    source = resolve_model_path(args.model, revision=args.revision)
    started = time.perf_counter()
    # The delay keeps the bar out of messages about what is refused at once.
    with tqdm(desc="Converting weights", unit="B", unit_scale=True, disable=None, delay=1e-3) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = convert_model(source, args.output, args.to, overwrite=args.overwrite, progress=progress)
    print(
        f"wrote {result.architecture}, {result.num_parameters / 1e6:,.1f} million parameters as {args.to} "
        f"({', '.join(result.dtypes)}, {result.num_bytes / 2**20:,.1f} MiB), to {args.output} in "
        f"{time.perf_counter() - started:.1f} s",
        file=sys.stderr,
    )
    return 0
