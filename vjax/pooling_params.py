"""What a request asks of a model that pools; names and meaning as in vLLM."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from vjax.errors import VjaxValidationError


@dataclass
class PoolingParams:
    """Parameters of `LLM.embed`, `encode`, `classify` and `score`; None is the engine's pooler_config, or the model's
    own way.

    Raises:
        VjaxValidationError: A value is out of its domain. What the model can do is checked with the request.
    """

    #: Most tokens of the prompt, the last ones; -1 is as many as the model takes. None: a longer one is an error.
    truncate_prompt_tokens: int | None = None
    #: Numbers of an embedding, the first ones, for models that were trained for it; it is normalised afterwards.
    dimensions: int | None = None
    #: Whether an embedding gets length 1.
    normalize: bool | None = None
    #: Whether logits become probabilities (softmax over several labels, sigmoid of one). Of embeddings: `normalize`.
    use_activation: bool | None = None
    #: With pooling type "STEP": the token whose outputs are wanted, and which of its outputs.
    step_tag_id: int | None = None
    returned_token_ids: list[int] | None = None
    #: "embed", "classify", "score", "token_embed" or "token_classify"; methods fill it in.
    task: str | None = None
    #: True computes all of the prompt. Pooling that looks at every token does in any case.
    skip_reading_prefix_cache: bool | None = None

    def __post_init__(self) -> None:
        for name in ("normalize", "use_activation", "skip_reading_prefix_cache"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise _error(name, value, "must be True, False or None")
        for name, low in (("truncate_prompt_tokens", -1), ("dimensions", 1), ("step_tag_id", 0)):
            value = getattr(self, name)
            if value is not None and not _is_integer(value, low):
                raise _error(name, value, f"must be an integer of at least {low}, or None")
        if self.truncate_prompt_tokens == 0:
            raise _error("truncate_prompt_tokens", 0, "leaves nothing; pass at least 1, or -1 for as many as fit")
        ids = self.returned_token_ids
        if ids is not None and not (isinstance(ids, (list, tuple)) and ids and all(_is_integer(i, 0) for i in ids)):
            raise _error("returned_token_ids", ids, "must be a list of integers from 0 on that is not empty, or None")
        if self.task is not None and not isinstance(self.task, str):
            raise _error("task", self.task, "must be the name of a task, or None")

    def clone(self) -> PoolingParams:
        """A copy that shares no list with the original. Values assigned after construction are checked here."""
        ids = self.returned_token_ids
        return dataclasses.replace(self, returned_token_ids=None if ids is None else list(ids))


def _is_integer(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _error(name: str, value: object, what: str) -> VjaxValidationError:
    return VjaxValidationError(f"{name}={value!r:.100} {what}.", parameter=name, value=value)
