"""Where a run file's values come from: the file that it extends, itself, the command line. Later layers win."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vjax.config import yaml_io
from vjax.config.prompts import is_prompt_file
from vjax.errors import ConfigError

SECTIONS = ("engine", "sampling", "prompts", "output")
COMMAND_LINE = "command line"

#: Sections that layers fill key by key; the others are replaced as a whole.
_MAPPINGS = ("engine", "sampling")
#: Values that stay text on the command line, whatever they look like.
_TEXT_KEYS = {
    ("engine", "model"),
    ("engine", "tokenizer"),
    ("engine", "revision"),
    ("engine", "download_dir"),
    ("output",),
}


@dataclass(frozen=True)
class Layer:
    #: Path of a file, or COMMAND_LINE.
    source: str
    values: Mapping[Any, Any]


def read_layers(path: Path) -> list[Layer]:
    """The run file and, before it, those that it extends.

    A relative path in `extends` or `prompts` counts from the folder of the file that it stands in.

    Raises:
        ConfigError: A file cannot be read or holds no mapping, or files extend each other in a circle.
    """
    layers: list[Layer] = []
    chain: list[Path] = []
    following: Path | None = path
    while following is not None:
        chain.append(following)
        if following.resolve() in [earlier.resolve() for earlier in chain[:-1]]:
            circle = " -> ".join(map(str, chain))
            raise ConfigError(f"Run files extend each other in a circle: {circle}; remove one `extends`.")
        values = _read(chain)
        base = values.pop("extends", None)
        if base is not None and (not isinstance(base, str) or not base):
            raise ConfigError(f"{following}: extends={base!r} must be the path of another run file.")
        if is_prompt_file(values.get("prompts")):
            values["prompts"] = str(following.parent / Path(values["prompts"]).expanduser())
        layers.insert(0, Layer(str(following), values))
        following = None if base is None else following.parent / Path(base).expanduser()
    return layers


def override_layer(arguments: Sequence[str]) -> Layer:
    """`--section.key value` arguments; later ones win.

    `--section.key=value` is the same, `--section.key` alone means true, dashes in names stand for underscores. Values
    are YAML ("null", "[1, 2]", "1e-3"). A relative path in `--prompts` counts from the working directory. Whether a key
    exists is checked with the rest of the document.

    Raises:
        ConfigError: An argument has no such form.
    """
    values: dict[str, Any] = {}
    for keys, text in _parse_arguments(arguments):
        value = _parse_value(keys, text)
        values = merge([values, {keys[0]: value} if len(keys) == 1 else {keys[0]: {keys[1]: value}}])
    return Layer(COMMAND_LINE, values)


def merge(documents: Sequence[Mapping[Any, Any]]) -> dict[Any, Any]:
    """One document, in which later ones win: `engine` and `sampling` key by key, where an empty section says nothing.

    A section that should be a mapping and is none stays as it is, for the check of the whole document to find.
    """
    merged: dict[Any, Any] = {}
    for document in documents:
        for name, value in document.items():
            before = merged.get(name)
            if name not in _MAPPINGS or before is None:
                merged[name] = dict(value) if isinstance(value, Mapping) else value
            elif isinstance(before, Mapping) and value is not None:
                merged[name] = {**before, **value} if isinstance(value, Mapping) else value
    return merged


def origin(layers: Sequence[Layer], section: Any, key: Any = None) -> str | None:
    """Source of the layer that decides a section, or a key in it; None if none names it."""
    for layer in reversed(layers):
        value = layer.values.get(section)
        if (section in layer.values) if key is None else (isinstance(value, Mapping) and key in value):
            return layer.source
    return None


def kind(value: Any) -> str:
    """What a value is, for messages."""
    names = {dict: "a mapping", list: "a list", str: "a string", bool: "a truth value", int: "an integer"}
    return f"{names.get(type(value), 'a ' + type(value).__name__)} ({value!r:.60})"


def _read(chain: list[Path]) -> dict[Any, Any]:
    path = chain[-1]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        hint = f"correct `extends` in {chain[-2]}" if len(chain) > 1 else "pass the path of a YAML run file"
        raise ConfigError(f"{path} cannot be read ({reason}); {hint}.") from e
    values = yaml_io.parse(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds {kind(values)}; it must hold a mapping with the sections {', '.join(SECTIONS)}."
        )
    return values


def _parse_arguments(arguments: Sequence[str]) -> list[tuple[tuple[str, ...], str]]:
    pairs = []
    rest = list(arguments)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        keys = tuple(key.replace("-", "_") for key in name.removeprefix("--").split("."))
        if not name.startswith("--") or len(keys) > 2 or not all(keys):
            raise ConfigError(f"{name!r} is not an override; write --section.key value, as in --engine.max_num_seqs 8.")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        pairs.append((keys, text))
    return pairs


def _parse_value(keys: tuple[str, ...], text: str) -> Any:
    if keys in _TEXT_KEYS:
        return None if text == "null" else text
    try:
        value = yaml_io.parse(text, f"--{'.'.join(keys)}")
    except ConfigError:
        # Such as a stop string with a colon in it: what is not YAML is meant as it stands.
        value = text
    if keys == ("prompts",) and is_prompt_file(value):
        return str(Path(value).expanduser().absolute())
    return text if keys == ("sampling", "stop") and not isinstance(value, (str, list)) and value is not None else value
