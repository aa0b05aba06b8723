"""`vjax models`: which models are supported, and whether a given one is, without loading it."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from vjax.errors import ModelLoadError


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "models",
        allow_abbrev=False,
        help="say which models are supported, or whether a given one is",
        description=(
            "Without arguments lists the supported architectures. With models says of each whether it is supported, "
            "from its config.json and the headers of its weight files; of a hub id only config.json is fetched. "
            "Exit code 1: one of them is not supported."
        ),
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folder, hub id or vjax-tiny")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--json", action="store_true", help="one JSON object per model")
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    if not args.models:
        return _list(as_json=args.json)
    results = [_check(model, args.revision) for model in args.models]
    for result in results:
        print(json.dumps(result) if args.json else _text(result))
    return 0 if all(result["supported"] for result in results) else 1


def _list(*, as_json: bool) -> int:
    from vjax.models.registry import MODELS, POOLING_MODELS

    texts = {
        name: (importlib.import_module(module).__doc__ or "").strip().splitlines()[0] for name, module in MODELS.items()
    }
    texts |= {name: f"{base} {_HEADS[head]}" for name, (base, head) in POOLING_MODELS.items()}
    for architecture, text in texts.items():
        print(json.dumps({"architecture": architecture, "models": text}) if as_json else f"{architecture:32s} {text}")
    if not as_json:
        print("`vjax models MODEL` says whether a checkpoint is supported.", file=sys.stderr)
    return 0


#: What a model is with another head, see `ArchConfig.head`.
_HEADS = {"none": "without a head, for embeddings", "score": "with classes", "score_mlp": "with rewards"}


def _check(model: str, revision: str | None) -> dict[str, Any]:
    from vjax.weights.hub import resolve_config_path
    from vjax.weights.inspection import inspect_model

    try:
        folder: Path = resolve_config_path(model, revision)
        facts = inspect_model(folder)
    except ModelLoadError as e:
        return {"model": model, "supported": False, "reason": str(e)}
    return {
        "model": model,
        "supported": True,
        "architecture": facts.arch.architecture,
        "num_parameters": facts.num_parameters,
        "num_layers": facts.arch.num_layers,
        "checkpoint_dtype": facts.dtype,
        "weight_bytes": facts.weight_bytes(),
        "kv_bytes_per_token": facts.kv_bytes_per_token(),
        "max_model_len": facts.arch.max_context_len,
        "weights_checked": facts.weights_checked,
    }


def _text(result: dict[str, Any]) -> str:
    if not result["supported"]:
        return f"{result['model']}: not supported. {result['reason']}"
    weights = "weights checked" if result["weights_checked"] else "only config.json was read"
    return (
        f"{result['model']}: supported ({weights}). {result['architecture']}, {result['num_layers']} layers, "
        f"{_count(result['num_parameters'])} parameters, {_size(result['weight_bytes'])} in bfloat16, "
        f"{_size(result['kv_bytes_per_token'])} of KV cache a token, contexts of up to {result['max_model_len']} tokens"
    )


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"


def _size(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number / 2**10:.1f} KiB"
