"""What ends a text of a model, and the compiler of grammars for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vjax.config.engine_config import EngineConfig
from vjax.structured.compiler import GrammarCompiler
from vjax.structured.reasoning import ReasoningTags
from vjax.text.tokenizer import Tokenizer


def eos_token_ids(
    tokenizer: Tokenizer | None, config: EngineConfig, model_ids: Sequence[int]
) -> tuple[int | None, tuple[int, ...]]:
    """The EOS token, and further ones that generation_config.json names.

    Args:
        model_ids: Those of config.json; the first one is used where there is no tokenizer, or it has no EOS.
    """
    eos = tokenizer.eos_token_id if tokenizer is not None else None
    if eos is None and model_ids:
        eos = model_ids[0]
    return eos, tuple(i for i in config.model.generation_eos_token_ids if i != eos)


def make_compiler(
    load: Callable[[], Tokenizer | None],
    config: EngineConfig,
    *,
    vocab_size: int,
    model_eos_token_ids: Sequence[int],
    tags: ReasoningTags | None = None,
) -> GrammarCompiler:
    """A compiler for an engine's model; `load` gives its tokenizer when the first grammar comes."""

    def ends(tokenizer: Tokenizer) -> list[int]:
        eos, further = eos_token_ids(tokenizer, config, model_eos_token_ids)
        return list(further) if eos is None else [eos, *further]

    return GrammarCompiler(load, vocab_size=vocab_size, eos_token_ids=ends, tags=tags)
