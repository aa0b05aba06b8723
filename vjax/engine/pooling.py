"""The front end's side of a model that pools: what a request may ask, and from pooled states to what is returned.

PoolingParams -> complete_params -> ... core ... -> EngineOutput.pooled -> finished_values
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vjax.config.pooler import TASKS, Pooling, dimensions_problem
from vjax.errors import VjaxValidationError
from vjax.messages import EngineRequest
from vjax.pooling_params import PoolingParams

#: Task -> what the user can do where the model does not do it.
_HINTS = {
    "embed": "create the LLM with convert='embed' for embeddings",
    "token_embed": "create the LLM with convert='embed' for embeddings",
    "classify": "it needs a checkpoint with a score head, such as one of ...ForSequenceClassification",
    "token_classify": "it needs a score head; convert='reward' makes the hidden states of tokens its result",
    "score": "it needs a score head with one label",
}


@dataclass(slots=True)
class ProcessedPooling:
    """One prompt, ready for the engine core."""

    request_id: str
    #: None where only token ids were given.
    prompt: str | None
    prompt_token_ids: list[int]
    #: As `complete_params` gives them.
    params: PoolingParams
    #: Exactly one.
    requests: list[EngineRequest]
    #: Monotonic seconds.
    arrival_time: float


def complete_params(params: PoolingParams, pooling: Pooling) -> PoolingParams:
    """A checked copy with task, use_activation (of embeddings too), dimensions and those of "STEP" filled in.

    Raises:
        VjaxValidationError: The model does not do the task, or a parameter is none of the task's.
    """
    params = params.clone()
    params.task = task = params.task or pooling.tasks[0]
    check_task(task, pooling)
    embeds = task in ("embed", "token_embed")
    if not embeds:
        for name in ("dimensions", "normalize"):
            if (value := getattr(params, name)) is not None:
                raise _error(name, value, f"is for embeddings, and the task is {task!r}; leave it out")
    if params.use_activation is None:
        params.use_activation = pooling.use_activation if params.normalize is None else params.normalize
    elif params.normalize not in (None, params.use_activation):
        raise _error("normalize", params.normalize, f"contradicts use_activation={params.use_activation}; pass one")
    if params.dimensions is not None:
        if (problem := dimensions_problem(params.dimensions, pooling.matryoshka, pooling.width)) is not None:
            raise _error("dimensions", params.dimensions, problem.removesuffix("."))
    elif embeds:
        params.dimensions = pooling.dimensions
    _complete_step(params, pooling)
    return params


def check_task(task: str, pooling: Pooling) -> None:
    """Raises: VjaxValidationError if the model does not do the task."""
    if task in pooling.tasks:
        return
    if task not in TASKS:
        raise _error("pooling_task", task, f"must be one of {', '.join(TASKS)}")
    raise _error(
        "pooling_task", task, f"is not what this model does, which is {', '.join(pooling.tasks)}; {_HINTS[task]}"
    )


def pooling_type(params: PoolingParams, pooling: Pooling) -> str:
    """Of complete parameters: what the engine core makes of the prompt, one of `messages.POOLING_TYPES`."""
    return "ALL" if (params.task or "").startswith("token_") else pooling.sequence_type


def finished_values(
    values: np.ndarray, params: PoolingParams, pooling: Pooling, prompt_token_ids: Sequence[int]
) -> np.ndarray:
    """What is returned.

    Args:
        values: f32 [width] or [tokens, width], as the core pooled them.
        params: Complete.
    """
    if params.task in ("embed", "token_embed"):
        values = values[..., : params.dimensions]
        if params.use_activation:
            length = np.sqrt(np.square(values).sum(axis=-1, keepdims=True))
            values = values / np.maximum(length, np.float32(1e-12))
        return np.ascontiguousarray(values)
    if params.returned_token_ids is not None:
        values = values[..., params.returned_token_ids]
    if params.step_tag_id is not None:
        values = values[np.asarray(prompt_token_ids) == params.step_tag_id]
    return _activated(values, pooling.activation) if params.use_activation else values


def _activated(logits: np.ndarray, activation: str) -> np.ndarray:
    if activation == "softmax":
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)
    if activation == "sigmoid":
        # Of the negative magnitude, which cannot overflow.
        power = np.exp(-np.abs(logits))
        return np.where(logits >= 0, 1 / (1 + power), power / (1 + power)).astype(np.float32)
    return logits


def _complete_step(params: PoolingParams, pooling: Pooling) -> None:
    steps = pooling.token_type == "STEP" and params.task == "token_classify"
    for name in ("step_tag_id", "returned_token_ids"):
        value = getattr(params, name)
        if value is not None and not steps:
            raise _error(name, value, "is for the task 'token_classify' with pooling_type 'STEP'; leave it out")
        if value is None and steps:
            setattr(params, name, getattr(pooling, name))
    if params.returned_token_ids is not None:
        params.returned_token_ids = list(params.returned_token_ids)
        if max(params.returned_token_ids) >= pooling.width:
            raise _error("returned_token_ids", params.returned_token_ids, f"must be below the {pooling.width} labels")


def _error(name: str, value: object, what: str) -> VjaxValidationError:
    return VjaxValidationError(f"{name}={value!r:.100} {what}.", parameter=name, value=value)
