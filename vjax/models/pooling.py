"""Whether an engine generates or pools, and how: from its arguments, config.json and sentence-transformers' files.
No jax.

Rules as in vLLM, but where a comment says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vjax.config.pooler import PoolerConfig, Pooling, dimensions_problem
from vjax.errors import ConfigError, ModelLoadError
from vjax.models.arch import ArchConfig
from vjax.models.registry import arch_config_from_hf
from vjax.models.sentence_transformers import read_sentence_transformer

#: Activations of classifiers that were trained with sentence-transformers, by torch's class names.
_ACTIVATIONS = {"Identity": "none", "Sigmoid": "sigmoid", "Softmax": "softmax"}


def resolve_model(
    config: dict[str, Any],
    model_dir: Path,
    *,
    runner: str = "auto",
    convert: str = "auto",
    pooler_config: Mapping[str, Any] | None = None,
) -> tuple[ArchConfig, Pooling | None]:
    """The architecture with the head that the engine needs, and how it pools (None: it generates).

    Args:
        config: Parsed config.json.
        model_dir: Where files of sentence-transformers may be.
        runner, convert, pooler_config: As in `EngineArgs`. A convert that asks for pooling decides for runner="auto".

    Raises:
        ConfigError: The arguments contradict each other or the model.
        ModelLoadError: The model is not supported.
    """
    arch = arch_config_from_hf(config)
    asks_pooling = convert not in ("auto", "none")
    if runner == "generate" and asks_pooling:
        raise ConfigError(
            f"convert={convert!r} makes a model pool, and runner='generate' forbids it; pass runner='pooling'.",
            parameter="convert",
            value=convert,
        )
    if runner == "generate" and arch.pools:
        raise ConfigError(
            f"runner='generate': {arch.architecture} has no language model head; pass runner='pooling'.",
            parameter="runner",
            value=runner,
        )
    if runner == "generate":
        return arch, None
    trained = read_sentence_transformer(model_dir)
    if runner == "auto" and not (arch.pools or asks_pooling or trained is not None):
        if pooler_config:
            raise ConfigError(
                f"pooler_config={pooler_config!r} is for a model that pools, and {arch.architecture} generates; pass "
                "runner='pooling' as well.",
                parameter="pooler_config",
                value=pooler_config,
            )
        return arch, None
    given = PoolerConfig(**(pooler_config or {}))
    arch = arch_config_from_hf(config, _head(arch, convert))
    tasks = _tasks(arch, convert)
    token_type = given.token_type or ("STEP" if arch.architecture == "Qwen2ForProcessRewardModel" else "ALL")
    if given.token_type is not None:
        tasks = tuple(sorted(tasks, key=lambda task: not task.startswith("token_")))
    if given.normalize is not None and arch.head != "none":
        raise ConfigError(
            f"pooler_config: normalize={given.normalize} is for embeddings, and the model gives logits; pass "
            "use_activation.",
            parameter="pooler_config",
            value=given.normalize,
        )
    activated = given.use_activation if given.use_activation is not None else given.normalize
    if activated is None:
        activated = trained.normalize if trained is not None and arch.head == "none" else True
    return arch, Pooling(
        tasks=tasks,
        sequence_type=given.sequence_type or (trained.pooling_type if trained is not None else "LAST"),
        token_type=token_type,
        width=arch.pooled_width,
        activation=_activation(arch, config, tasks),
        use_activation=activated,
        dimensions=given.dimensions,
        matryoshka=_matryoshka(config, given.dimensions, arch.pooled_width),
        step_tag_id=given.step_tag_id,
        returned_token_ids=None if given.returned_token_ids is None else tuple(given.returned_token_ids),
    )


def _head(arch: ArchConfig, convert: str) -> str:
    if convert == "embed":
        return "none"
    if convert == "classify" and arch.head in ("lm", "none"):
        return "score"
    return arch.head if arch.pools else "none"


def _tasks(arch: ArchConfig, convert: str) -> tuple[str, ...]:
    if arch.head == "score_mlp" or convert == "reward":
        return ("token_classify",)
    if arch.head == "none":
        return "embed", "token_embed"
    return ("classify", "token_classify", "score") if arch.num_labels == 1 else ("classify", "token_classify")


def _activation(arch: ArchConfig, config: Mapping[str, Any], tasks: tuple[str, ...]) -> str:
    """What config.json names, else softmax over several labels and sigmoid of one. A reward, of a token as one number,
    is no probability and stays as it is."""
    if arch.head == "none" or ("classify" not in tasks and arch.num_labels == 1):
        return "none"
    own = config.get("sentence_transformers")
    named = own.get("activation_fn") if isinstance(own, Mapping) else None
    named = named or config.get("sbert_ce_default_activation_function")
    if named is not None:
        kind = str(named).rpartition(".")[2].removesuffix("()")
        if kind not in _ACTIVATIONS:
            raise ModelLoadError(
                f"config.json names the activation {named!r}; supported are {', '.join(_ACTIVATIONS)} of torch.nn.",
                parameter="activation_fn",
                value=named,
            )
        return _ACTIVATIONS[kind]
    problem = config.get("problem_type")
    if problem == "regression":
        return "none"
    return "sigmoid" if problem == "multi_label_classification" or arch.num_labels == 1 else "softmax"


def _matryoshka(config: Mapping[str, Any], dimensions: int | None, width: int) -> tuple[int, ...] | None:
    """Sizes of embeddings that config.json allows; see `Pooling.matryoshka`."""
    sizes = config.get("matryoshka_dimensions")
    allowed = tuple(sizes) if isinstance(sizes, list) else () if config.get("is_matryoshka") else None
    if dimensions is not None:
        if (problem := dimensions_problem(dimensions, allowed, width)) is not None:
            text = f"pooler_config: dimensions={dimensions} {problem}"
            raise ConfigError(text, parameter="pooler_config", value=dimensions)
    return allowed
