"""generation_config.json: default sampling parameters and the ids that end a sequence, treated as vLLM does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vjax.errors import ConfigError, VjaxValidationError
from vjax.log import logger, warning_once
from vjax.sampling_params import SamplingParams

_FILE = "generation_config.json"
#: Key of the file -> field of SamplingParams.
_FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}

_log = logger("config")


class GenerationDefaults(NamedTuple):
    #: Validated fields of SamplingParams.
    sampling_params: dict[str, Any]
    #: In file order.
    eos_token_ids: tuple[int, ...]


def resolve_generation(
    source: str,
    overrides: Mapping[str, Any] | None,
    model_file: Mapping[str, Any] | None,
    config_eos_token_ids: tuple[int, ...],
) -> GenerationDefaults:
    """Reads the defaults.

    Args:
        source: "auto" uses `model_file`; "vllm" uses nothing; else the path of a generation_config.json or its folder.
        overrides: Entries that replace the file's.
        model_file: Content of the model's own generation_config.json, None if it has none.
        config_eos_token_ids: EOS ids of config.json, used with "auto" where the file names none.

    Raises:
        ConfigError: The file cannot be read, or a value is not valid.
    """
    content: dict[str, Any] = {}
    if source == "auto":
        content = {"eos_token_id": list(config_eos_token_ids)}
        content |= {key: value for key, value in (model_file or {}).items() if value is not None}
    elif source != "vllm":
        content = read_generation_config(Path(source).expanduser())
    content |= overrides or {}
    return GenerationDefaults(_sampling_fields(content, source), _token_ids(content.get("eos_token_id")))


def read_generation_config(path: Path) -> dict[str, Any]:
    """Content of a generation_config.json, given by its path or its folder's.

    Raises:
        ConfigError: It cannot be read, or is no JSON object.
    """
    file = path / _FILE if path.is_dir() else path
    hint = f'pass "auto", "vllm", or the path of a {_FILE} or of its folder'
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise _error(str(path), f"cannot be read ({e.strerror}); {hint}") from e
    except ValueError as e:
        raise _error(str(path), f"is not JSON ({e}); {hint}") from e
    if not isinstance(content, dict):
        raise _error(str(path), f"holds no JSON object; {hint}")
    return content


def _sampling_fields(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    fields = {field: content[key] for key, field in _FIELDS.items() if content.get(key) is not None}
    penalty = content.get("repetition_penalty")
    if penalty is not None and penalty != 1.0:
        warning_once(
            _log, f"repetition_penalty={penalty} of the generation config is ignored: penalties are not supported yet"
        )
    try:
        SamplingParams(**fields)
    except VjaxValidationError as e:
        hint = 'correct the file, or pass generation_config="vllm" to do without it'
        raise _error(source, f"sets {str(e).removesuffix('.')} ({hint})") from e
    return fields


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise _error("eos_token_id", f"is {value!r}; it must be a token id or a list of token ids")
    return tuple(dict.fromkeys(ids))


def _error(source: str, what: str) -> ConfigError:
    return ConfigError(f"generation_config={source!r} {what}.", parameter="generation_config", value=source)
