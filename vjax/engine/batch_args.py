"""What `LLM.generate` and `LLM.chat` take for a batch, one per prompt: prompts, parameters, priorities, cache salts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeVar

from vjax.errors import VjaxValidationError
from vjax.pooling_params import PoolingParams
from vjax.sampling_params import SamplingParams

Params = TypeVar("Params", SamplingParams, PoolingParams)

#: One prompt: text, token ids, or a mapping with "prompt" or "prompt_token_ids" and optionally "cache_salt".
Prompt = str | Mapping[str, Any] | Sequence[int]

#: vLLM's further keywords of generate and chat -> the only value besides None that asks for nothing.
_NO_EFFECT: dict[str, Any] = {
    "lora_request": None,
    "trace_headers": None,
    "data_parallel_rank": None,
    "prompt_adapter_request": None,
    "guided_options_request": None,
    "mm_processor_kwargs": {},
}


def prompt_list(prompts: Any) -> list[Prompt]:
    """One prompt or several, as a list. Integers (a list, a tuple, a 1-d array) are one prompt of token ids.

    Raises:
        VjaxValidationError: It is neither.
    """
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if hasattr(prompts, "tolist"):  # numpy
        prompts = prompts.tolist()
    if not isinstance(prompts, (list, tuple, range, Iterator)):
        raise VjaxValidationError(
            f"prompts={prompts!r:.100} is a {type(prompts).__name__}; pass a text, a list of token ids, "
            '{"prompt": text}, {"prompt_token_ids": [...]}, or a list of such prompts.',
            parameter="prompts",
            value=prompts,
        )
    batch: list[Any] = list(prompts)
    return [batch] if batch and isinstance(batch[0], Integral) else batch


def params_per_prompt(
    params: Any, num_prompts: int, kind: type[Params] = SamplingParams, name: str = "sampling_params"
) -> Sequence[Params]:
    """Parameters of each prompt, of type `kind`.

    Raises:
        VjaxValidationError: It is no `kind` and no list of `num_prompts` of them.
    """
    if isinstance(params, kind):
        return [params] * num_prompts
    if not isinstance(params, (list, tuple)):
        example = ", such as SamplingParams(temperature=0)" if kind is SamplingParams else ""
        raise VjaxValidationError(
            f"{name}={params!r:.100} is a {type(params).__name__}; pass a {kind.__name__}{example}, or a list with one "
            "per prompt.",
            parameter=name,
            value=params,
        )
    for i, entry in enumerate(params):
        if not isinstance(entry, kind):
            raise VjaxValidationError(
                f"{name}[{i}]={entry!r:.100} is a {type(entry).__name__}; pass a {kind.__name__}.",
                parameter=name,
                value=entry,
            )
    _check_length(name, params, num_prompts, f"one {kind.__name__} for all prompts or one per prompt")
    return params


def priority_per_prompt(priority: Any, num_prompts: int) -> Sequence[int]:
    """Priority of each prompt, 0 without a list. The numbers are checked with the prompts.

    Raises:
        VjaxValidationError: It is no list of `num_prompts` entries.
    """
    if priority is None:
        return [0] * num_prompts
    if hasattr(priority, "tolist"):  # numpy
        priority = priority.tolist()
    if not isinstance(priority, (list, tuple, range)):
        raise VjaxValidationError(
            f"priority={priority!r:.100} is a {type(priority).__name__}; pass a list with one integer per prompt.",
            parameter="priority",
            value=priority,
        )
    _check_length("priority", priority, num_prompts, "one per prompt")
    return priority


def salt_per_prompt(cache_salt: Any, num_prompts: int) -> Sequence[str | None]:
    """Cache salt of each prompt, None without one. A text is the salt of all; texts are checked with the prompts.

    Raises:
        VjaxValidationError: It is no text and no list of `num_prompts` entries.
    """
    if cache_salt is None or isinstance(cache_salt, str):
        return [cache_salt] * num_prompts
    if not isinstance(cache_salt, (list, tuple)):
        raise VjaxValidationError(
            f"cache_salt={cache_salt!r:.100} is a {type(cache_salt).__name__}; pass a text, or a list with one per "
            "prompt.",
            parameter="cache_salt",
            value=cache_salt,
        )
    _check_length("cache_salt", cache_salt, num_prompts, "one text for all prompts or one per prompt")
    return cache_salt


def check_other_arguments(method: str, arguments: Mapping[str, Any], owner: str = "LLM") -> None:
    """Accepts vLLM's further keywords of a method of the class `owner` while they ask for nothing.

    Raises:
        VjaxValidationError: One of them asks for something.
        TypeError: vLLM has no such keyword either.
    """
    for name, value in arguments.items():
        if name not in _NO_EFFECT:
            raise TypeError(f"{owner}.{method}() got an unexpected keyword argument {name!r}")
        if value is not None and value != _NO_EFFECT[name]:
            raise VjaxValidationError(
                f"{name}={value!r:.100} is not supported by {owner}.{method}; leave the argument out.",
                parameter=name,
                value=value,
            )


def _check_length(name: str, entries: Sequence[Any], num_prompts: int, what: str) -> None:
    if len(entries) != num_prompts:
        raise VjaxValidationError(
            f"{name} has {len(entries)} entries for {num_prompts} prompts; give {what}.", parameter=name, value=entries
        )
