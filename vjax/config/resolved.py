"""A run file with every value decided: as a run file again, and as what an output file is begun with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from vjax import envs
from vjax.config.file import SAMPLING_FIELDS, RunFile
from vjax.config.layers import origin
from vjax.config.prompts import is_prompt_file
from vjax.config.yaml_io import dump
from vjax.sampling_params import SamplingParams


def to_yaml(run: RunFile) -> str:
    """A run file that gives the same run, with the source of each value as a comment.

    It extends nothing and names every value but nulls (where the engine chooses), the mode included, so that neither
    defaults nor the environment change it.
    A prompt file becomes an absolute path; model and output stay as they are, relative to the working directory.
    """
    lines = [f"# {run.path} with every value decided; `vjax run` takes it. What is missing the engine chooses."]
    lines += ["engine:", *_section(run, "engine", _engine(run))]
    if run.sampling is None:
        lines.append("sampling: null  # the model's own defaults")
    else:
        lines += ["sampling:", *_section(run, "sampling", _sampling(run.sampling))]
    source = next(layer.values["prompts"] for layer in reversed(run.layers) if "prompts" in layer.values)
    if is_prompt_file(source):
        path = Path(source).expanduser().absolute()
        lines.append(f"prompts: {dump(str(path))}  # {origin(run.layers, 'prompts')}")
    else:
        lines.append(f"prompts:  # {origin(run.layers, 'prompts')}")
        lines += [f"  - {dump(prompt)}" for prompt in run.prompts]
    output = None if run.output is None else str(run.output)
    lines.append(f"output: {dump(output)}  # {origin(run.layers, 'output') or 'default'}")
    return "\n".join(lines) + "\n"


def identity(run: RunFile) -> dict[str, Any]:
    """What decides the outputs of a run, as JSON values by dotted name: two runs of equal identity continue each other.

    Where the outputs go is no part of it.
    """
    named = {f"engine.{name}": value for name, value in _engine(run).items()}
    if run.sampling is None:
        named["sampling"] = None
    else:
        named |= {f"sampling.{name}": value for name, value in _sampling(run.sampling).items()}
    prompts = json.dumps(run.prompts, sort_keys=True, default=str).encode()
    named |= {"prompts": f"{len(run.prompts)} with hash {hashlib.sha256(prompts).hexdigest()[:16]}"}
    return json.loads(json.dumps(named, default=str))


def _engine(run: RunFile) -> dict[str, Any]:
    values = dataclasses.asdict(run.engine)
    if run.engine.use_v1 is None:
        values["use_v1"] = envs.use_v1()
    return values


def _sampling(params: SamplingParams) -> dict[str, Any]:
    values = dataclasses.asdict(params)
    return {name: values[name] for name in SAMPLING_FIELDS}


def _section(run: RunFile, section: str, values: dict[str, Any]) -> list[str]:
    lines = []
    for name, value in values.items():
        source = origin(run.layers, section, name)
        if value is not None or source is not None:
            lines.append(f"  {name}: {dump(value)}  # {source or 'default'}")
    return lines
