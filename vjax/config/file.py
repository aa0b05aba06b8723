"""Run files: one YAML document that holds an engine, its sampling parameters, prompts and where the outputs go.

engine: {model: vjax-tiny, max_num_seqs: 8}      # EngineArgs
sampling: {temperature: 0, max_tokens: 64}       # SamplingParams; without it the model's own defaults
prompts: [Hello, {messages: [{role: user, content: Hi}]}]     # or the path of a .txt or .jsonl file
output: out.jsonl                                # or null: standard output
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vjax.config import checks, yaml_reader
from vjax.config.engine_args import CHECKS, EngineArgs, split_arguments
from vjax.config.prompts import read_prompts
from vjax.config.vllm_args import KNOWN
from vjax.errors import ConfigError, VjaxValidationError
from vjax.sampling_params import SamplingParams

SECTIONS = ("engine", "sampling", "prompts", "output")

#: What a run returns is decided by its output file.
_SAMPLING_FIELDS = tuple(f.name for f in dataclasses.fields(SamplingParams) if f.name != "output_kind")
#: Values that stay text on the command line, whatever they look like.
_TEXT_KEYS = {
    ("engine", "model"),
    ("engine", "tokenizer"),
    ("engine", "revision"),
    ("engine", "download_dir"),
    ("output",),
}


@dataclass(frozen=True)
class RunFile:
    #: Where it was read.
    path: Path
    engine: EngineArgs
    #: None: the model's generation_config.json decides.
    sampling: SamplingParams | None
    #: Each a text, or a mapping with "prompt", "prompt_token_ids" or "messages". Not empty.
    prompts: list[str | dict[str, Any]]
    #: None is standard output. A relative path counts from the working directory.
    output: Path | None


def load_run_file(path: str | Path, overrides: Sequence[str] = ()) -> RunFile:
    """Reads a run file and applies overrides from the command line (see `apply_overrides`).

    A relative path in `prompts` counts from the file's folder.

    Raises:
        ConfigError: The file cannot be read, or keys or values are wrong; the text lists all of them.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise ConfigError(f"{path} cannot be read ({reason}); pass the path of a YAML run file.") from e
    document = yaml_reader.parse(text, str(path))
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise ConfigError(
            f"{path} holds {_kind(document)}; it must hold a mapping with the sections {', '.join(SECTIONS)}."
        )
    return build_run_file(apply_overrides(document, overrides), path)


def apply_overrides(document: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """A copy of the document with `--section.key value` arguments applied; later ones win.

    `--section.key=value` is the same, `--section.key` alone means true, dashes in names stand for underscores. Values
    are YAML ("null", "[1, 2]", "1e-3"). A relative path in `--prompts` counts from the working directory. Whether a key
    exists is checked with the rest of the document.

    Raises:
        ConfigError: An argument has no such form.
    """
    merged = {name: dict(value) if isinstance(value, Mapping) else value for name, value in document.items()}
    for keys, text in _parse_arguments(arguments):
        value = _parse_value(keys, text)
        if len(keys) == 1:
            merged[keys[0]] = value
            continue
        section = merged.get(keys[0])
        merged[keys[0]] = {**section, keys[1]: value} if isinstance(section, dict) else {keys[1]: value}
    return merged


def build_run_file(document: Mapping[str, Any], path: Path) -> RunFile:
    """Checks a whole document.

    Raises:
        ConfigError: Lists everything that is wrong, a line each.
    """
    problems = [f"{name}: unknown section; {_hint(name, SECTIONS)}" for name in document if name not in SECTIONS]
    engine = _engine(_section(document, "engine", problems), problems)
    sampling_section = _section(document, "sampling", problems)
    sampling = _sampling(sampling_section, problems) if sampling_section else None
    prompts = read_prompts(document.get("prompts"), path.parent, problems)
    output = document.get("output")
    if output is not None and (not isinstance(output, str) or not output):
        problems.append(f"output: {output!r} must be the path of a file, or null for standard output")
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{path} has {count}:\n" + "\n".join(f"  {problem}" for problem in problems))
    return RunFile(path, EngineArgs.from_kwargs(**engine), sampling, prompts, Path(output) if output else None)


def _section(document: Mapping[str, Any], name: str, problems: list[str]) -> dict[str, Any]:
    section = document.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict):
        problems.append(f"{name}: must be a mapping of names to values, and is {_kind(section)}")
        return {}
    for key in [key for key in section if not isinstance(key, str)]:
        problems.append(f"{name}.{key}: a key must be a name, and is {_kind(key)}")
    return {key: value for key, value in section.items() if isinstance(key, str)}


def _engine(section: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    _, _, refused = split_arguments(section)
    for name, text in refused.items():
        unknown = name not in CHECKS and name not in KNOWN
        problems.append(f"engine.{name}: unknown key; {_hint(name, CHECKS)}" if unknown else f"engine.{text}")
    return section


def _sampling(section: dict[str, Any], problems: list[str]) -> SamplingParams | None:
    before = len(problems)
    for name, value in section.items():
        if name not in _SAMPLING_FIELDS:
            problems.append(f"sampling.{name}: unknown key; {_hint(name, _SAMPLING_FIELDS)}")
            continue
        try:
            # Alone, so that each wrong value is found; the default max_tokens must not judge min_tokens here.
            alone: dict[str, Any] = {"max_tokens": None, name: value}
            SamplingParams(**alone)
        except VjaxValidationError as e:
            problems.append(f"sampling.{str(e).removesuffix('.')}")
    if len(problems) > before:
        return None
    try:
        return SamplingParams(**section)
    except VjaxValidationError as e:
        problems.append(f"sampling.{str(e).removesuffix('.')}")
        return None


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
        value = yaml_reader.parse(text, f"--{'.'.join(keys)}")
    except ConfigError:
        # Such as a stop string with a colon in it: what is not YAML is meant as it stands.
        value = text
    if keys == ("prompts",) and isinstance(value, str):
        return str(Path(value).absolute())
    return text if keys == ("sampling", "stop") and not isinstance(value, (str, list)) and value is not None else value


def _hint(name: Any, valid: Any) -> str:
    return checks.did_you_mean(str(name), valid)


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "a string", bool: "a truth value"}
    return f"{names.get(type(value), 'a ' + type(value).__name__)} ({value!r:.60})"
