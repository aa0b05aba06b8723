"""Reads what the files of sentence-transformers in a model folder say of pooling. No jax."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vjax.errors import ModelLoadError

MODULES_FILE = "modules.json"

#: `pooling_mode_...` of a Pooling module's config.json, and the values of its successor `pooling_mode` -> pooling type.
_MODES = {
    "pooling_mode_cls_token": "CLS",
    "pooling_mode_mean_tokens": "MEAN",
    "pooling_mode_lasttoken": "LAST",
    "cls": "CLS",
    "mean": "MEAN",
    "lasttoken": "LAST",
}


@dataclass(frozen=True)
class SentenceTransformer:
    """A model's modules behind the transformer."""

    #: "LAST", "MEAN" or "CLS".
    pooling_type: str
    #: Whether embeddings get length 1.
    normalize: bool


def read_sentence_transformer(model_dir: Path) -> SentenceTransformer | None:
    """What modules.json and the files that it names say; None where there is no modules.json, or no pooling in it.

    Raises:
        ModelLoadError: A file cannot be read, or asks for a module or a way of pooling that is not supported.
    """
    path = model_dir / MODULES_FILE
    if not path.is_file():
        return None
    modules = _read(path, list)
    if not all(isinstance(module, dict) and isinstance(module.get("type"), str) for module in modules):
        raise ModelLoadError(f"{path} is no list of modules with a type each.", parameter=MODULES_FILE)
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    unknown = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise ModelLoadError(
            f"{path} names {', '.join(unknown)}; supported are Transformer, Pooling and Normalize. Without the file "
            "the states of the last token are the embedding, or what pooler_config says.",
            parameter=MODULES_FILE,
            value=unknown,
        )
    if "Pooling" not in kinds:
        return None
    module = modules[kinds.index("Pooling")]
    return SentenceTransformer(
        _pooling_type(model_dir / str(module.get("path", "")) / "config.json"), "Normalize" in kinds
    )


def _pooling_type(path: Path) -> str:
    config = _read(path, dict)
    asked = [name for name, is_on in config.items() if name.startswith("pooling_mode_") and is_on]
    if not asked and "pooling_mode" in config:
        mode = config["pooling_mode"]
        asked = [str(name) for name in (mode if isinstance(mode, list) else [mode])]
    if len(asked) != 1 or asked[0] not in _MODES:
        raise ModelLoadError(
            f"{path} asks for {' and '.join(asked) or 'no pooling'}; exactly one of the first token (cls), the mean "
            "and the last token is supported.",
            parameter="pooling_mode",
            value=asked,
        )
    return _MODES[asked[0]]


def _read(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read as JSON: {error}", parameter=path.name) from error
    if not isinstance(content, kind):
        raise ModelLoadError(
            f"{path} holds a {type(content).__name__}; a {kind.__name__} is needed.", parameter=path.name
        )
    return content
