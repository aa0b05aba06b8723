"""What a model that pools makes of a prompt: as users ask for it, and resolved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vjax.config.checks import Check, Refused, boolean, integer
from vjax.errors import ConfigError

RUNNERS = ("auto", "generate", "pooling")
CONVERTS = ("auto", "none", "embed", "classify", "reward")
#: vLLM's former argument task -> runner and convert.
ENGINE_TASKS = {
    "auto": ("auto", "auto"),
    "generate": ("generate", "auto"),
    "embed": ("pooling", "embed"),
    "embedding": ("pooling", "embed"),
    "classify": ("pooling", "classify"),
    "score": ("pooling", "auto"),
    "reward": ("pooling", "reward"),
}
SEQUENCE_POOLING_TYPES = ("LAST", "MEAN", "CLS")
TOKEN_POOLING_TYPES = ("ALL", "STEP")

#: What a request can ask of a model that pools, as `pooling_task` of `LLM.encode` names it.
TASKS = ("embed", "classify", "score", "token_embed", "token_classify")


@dataclass(frozen=True)
class PoolerConfig:
    """vLLM's record of this name; None leaves a choice to the model.

    Raises:
        ConfigError: A value is out of its domain, or two contradict each other.
    """

    #: One of "LAST", "MEAN" and "CLS" (of embed, classify and score), or "ALL" and "STEP" (of tasks on tokens).
    pooling_type: str | None = None
    #: The two kinds by themselves.
    seq_pooling_type: str | None = None
    tok_pooling_type: str | None = None
    #: Embeddings get length 1; requests may say otherwise.
    normalize: bool | None = None
    #: Softmax or sigmoid on logits, and as `normalize` for embeddings.
    use_activation: bool | None = None
    #: Of embeddings, for models trained so that their first numbers are embeddings too.
    dimensions: int | None = None
    #: Of "STEP": the token whose outputs are wanted, and which of its outputs.
    step_tag_id: int | None = None
    returned_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        kinds = {
            "pooling_type": SEQUENCE_POOLING_TYPES + TOKEN_POOLING_TYPES,
            "seq_pooling_type": SEQUENCE_POOLING_TYPES,
            "tok_pooling_type": TOKEN_POOLING_TYPES,
        }
        for name, allowed in kinds.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise _error(name, value, f"must be one of {', '.join(allowed)}")
        if self.pooling_type is not None and (self.seq_pooling_type or self.tok_pooling_type):
            raise _error("pooling_type", self.pooling_type, "excludes seq_pooling_type and tok_pooling_type")
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            try:
                if value is not None:
                    check(value)
            except Refused as e:
                raise _error(name, value, str(e)) from e
        if None not in (self.normalize, self.use_activation) and self.normalize != self.use_activation:
            raise _error("normalize", self.normalize, f"contradicts use_activation={self.use_activation}; pass one")

    @property
    def sequence_type(self) -> str | None:
        return self.pooling_type if self.pooling_type in SEQUENCE_POOLING_TYPES else self.seq_pooling_type

    @property
    def token_type(self) -> str | None:
        return self.pooling_type if self.pooling_type in TOKEN_POOLING_TYPES else self.tok_pooling_type


@dataclass(frozen=True)
class Pooling:
    """How an engine that pools does it, with every choice made.

    Attributes:
        tasks: Of `TASKS`, those that the model can do; the first one is what `LLM.encode` does unless told.
        sequence_type: Of `SEQUENCE_POOLING_TYPES`.
        token_type: Of `TOKEN_POOLING_TYPES`.
        width: Numbers of an embedding, or labels.
        activation: What turns logits into what is returned: "softmax", "sigmoid" or "none".
        use_activation: Where a request does not say: whether logits get the activation, embeddings length 1.
        dimensions: Where a request does not say; None is `width`.
        matryoshka: Sizes to which embeddings may be cut; empty: any; None: they may not.
        step_tag_id, returned_token_ids: Of "STEP", where a request does not say.
    """

    tasks: tuple[str, ...]
    sequence_type: str
    token_type: str
    width: int
    activation: str = "none"
    use_activation: bool = True
    dimensions: int | None = None
    matryoshka: tuple[int, ...] | None = None
    step_tag_id: int | None = None
    returned_token_ids: tuple[int, ...] | None = None


def dimensions_problem(dimensions: int, allowed: tuple[int, ...] | None, width: int) -> str | None:
    """Why embeddings of so many numbers are refused, or None."""
    if allowed is None:
        return (
            "shortens embeddings, which the model was not trained for, as far as its config.json says; where it was, "
            'set "is_matryoshka": true or "matryoshka_dimensions": [...] there.'
        )
    if allowed and dimensions not in allowed:
        return f"is none of the sizes that the model was trained for: {', '.join(map(str, allowed))}."
    return None if dimensions <= width else f"is more than the {width} numbers of the model's embeddings."


def _ids(value: Any) -> list[int]:
    if not isinstance(value, (list, tuple)) or not value:
        raise Refused("must be a list of integers that is not empty")
    return [_count(i) for i in value]


_count = integer(0)
_CHECKS: dict[str, Check] = {
    "normalize": boolean,
    "use_activation": boolean,
    "dimensions": integer(1),
    "step_tag_id": _count,
    "returned_token_ids": Check(_ids, {"type": "array", "items": _count.schema, "minItems": 1}),
}


def _convert(value: Any) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(PoolerConfig)]
    if not isinstance(value, PoolerConfig):
        if not isinstance(value, Mapping) or not set(value) <= set(names):
            raise Refused(f"must be a PoolerConfig, or a mapping with no keys but {', '.join(names)}")
        try:
            value = PoolerConfig(**value)
        except ConfigError as e:
            raise Refused(f"has a wrong entry: {str(e).removesuffix('.')}") from e
    return {name: entry for name, entry in dataclasses.asdict(value).items() if entry is not None}


def _types(*allowed: str) -> dict[str, Any]:
    return {"enum": [*allowed, None]}


#: Of the engine argument: its value is a dict of the entries that are not None.
pooler_config = Check(
    _convert,
    {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "pooling_type": _types(*SEQUENCE_POOLING_TYPES, *TOKEN_POOLING_TYPES),
            "seq_pooling_type": _types(*SEQUENCE_POOLING_TYPES),
            "tok_pooling_type": _types(*TOKEN_POOLING_TYPES),
            **{name: {**check.schema, "type": [check.schema["type"], "null"]} for name, check in _CHECKS.items()},
        },
    },
)


def _error(name: str, value: object, what: str) -> ConfigError:
    return ConfigError(f"{name}={value!r} {what}.", parameter=name, value=value)
