"""Run files: one YAML document that holds an engine, its sampling parameters, prompts and where the outputs go.

extends: base.yaml                               # optional: a run file whose values count where this one has none
engine: {model: vjax-tiny, max_num_seqs: 8}      # EngineArgs
sampling: {temperature: 0, max_tokens: 64}       # SamplingParams; without it the model's own defaults
prompts: [Hello, {messages: [{role: user, content: Hi}]}]     # or the path of a .txt or .jsonl file
output: out.jsonl                                # or null: standard output
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vjax.config import checks
from vjax.config.engine_args import CHECKS, EngineArgs, split_arguments
from vjax.config.layers import SECTIONS, Layer, kind, merge, origin, override_layer, read_layers
from vjax.config.prompts import read_prompts
from vjax.config.vllm_args import KNOWN
from vjax.errors import ConfigError, VjaxValidationError
from vjax.sampling_params import SamplingParams

#: What a run returns is decided by its output file.
SAMPLING_FIELDS = tuple(f.name for f in dataclasses.fields(SamplingParams) if f.name != "output_kind")
#: Engine arguments whose default in a run file is another one: its output has timings.
ENGINE_DEFAULTS = {"disable_log_stats": False}


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
    #: Where the values came from, weakest first.
    layers: Sequence[Layer] = field(repr=False)


def load_run_file(path: str | Path, overrides: Sequence[str] = ()) -> RunFile:
    """Reads a run file and those that it extends, and applies overrides from the command line.

    Raises:
        ConfigError: A file cannot be read, or keys or values are wrong; the text lists all of them.
    """
    path = Path(path)
    return _build([*read_layers(path), override_layer(overrides)], path)


def _build(layers: list[Layer], path: Path) -> RunFile:
    """Raises: ConfigError that lists everything that is wrong, a line each."""
    document = merge([layer.values for layer in layers])
    problems: list[str] = []

    def add(text: str, section: Any, key: Any = None) -> None:
        source = origin(layers, section, key)
        inherited = source is not None and source in [layer.source for layer in layers[:-2]]
        problems.append(f"{text} (in {source})" if inherited else text)

    for name in document:
        if name not in SECTIONS:
            add(f"{name}: unknown section; {_hint(name, (*SECTIONS, 'extends'))}", name)
    sections = {name: _section(document, name, add) for name in ("engine", "sampling")}
    _check_engine(sections["engine"], add)
    sampling = _sampling(sections["sampling"], add) if sections["sampling"] else None
    prompts = read_prompts(document.get("prompts"), problems)
    output = document.get("output")
    if output is not None and (not isinstance(output, str) or not output):
        add(f"output: {output!r} must be the path of a file, or null for standard output", "output")
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{path} has {count}:\n" + "\n".join(f"  {problem}" for problem in problems))
    engine = EngineArgs.from_kwargs(**{**ENGINE_DEFAULTS, **sections["engine"]})
    return RunFile(path, engine, sampling, prompts, Path(output) if output else None, layers)


def _section(document: Mapping[str, Any], name: str, add: Any) -> dict[str, Any]:
    section = document.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict):
        add(f"{name}: must be a mapping of names to values, and is {kind(section)}", name)
        return {}
    for key in [key for key in section if not isinstance(key, str)]:
        add(f"{name}.{key}: a key must be a name, and is {kind(key)}", name, key)
    return {key: value for key, value in section.items() if isinstance(key, str)}


def _check_engine(section: dict[str, Any], add: Any) -> None:
    _, _, refused = split_arguments(section)
    for name, text in refused.items():
        unknown = name not in CHECKS and name not in KNOWN
        add(f"engine.{name}: unknown key; {_hint(name, CHECKS)}" if unknown else f"engine.{text}", "engine", name)


def _sampling(section: dict[str, Any], add: Any) -> SamplingParams | None:
    is_good = True
    for name, value in section.items():
        if name not in SAMPLING_FIELDS:
            add(f"sampling.{name}: unknown key; {_hint(name, SAMPLING_FIELDS)}", "sampling", name)
            is_good = False
            continue
        try:
            # Alone, so that each wrong value is found; the default max_tokens must not judge min_tokens here.
            alone: dict[str, Any] = {"max_tokens": None, name: value}
            SamplingParams(**alone)
        except VjaxValidationError as e:
            add(f"sampling.{str(e).removesuffix('.')}", "sampling", name)
            is_good = False
    if not is_good:
        return None
    try:
        return SamplingParams(**section)
    except VjaxValidationError as e:
        add(f"sampling.{str(e).removesuffix('.')}", "sampling")
        return None


def _hint(name: Any, valid: Any) -> str:
    return checks.did_you_mean(str(name), valid)
