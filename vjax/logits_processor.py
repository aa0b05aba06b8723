"""`LogitsProcessor`: what an engine does to logits beyond the sampling parameters, written by its user.

    class ShiftedEos(LogitsProcessor): ...
    llm = LLM(model, logits_processors=[ShiftedEos])
    llm.generate(prompt, SamplingParams(extra_args={"eos_bias": -2.0}))

It runs on the device, for all rows of a batch at once, as a part of the compiled sample program. A step of requests
that do not use it does not run it, and an engine without processors has the programs that it always had.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vjax.errors import ConfigError, VjaxValidationError
from vjax.sampling_params import SamplingParams

if TYPE_CHECKING:
    import jax

#: Numbers that all processors of an engine together may keep for a request.
MAX_VALUES = 4096


class LogitsProcessor:
    """The base class. An engine makes one object of each class, without arguments, in each process that needs it."""

    #: How many numbers of a request `apply` gets.
    num_values: int = 0

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        """Checks `params.extra_args` of a request, before anything of it is in the engine.

        Raises:
            ValueError: They do not fit. The request is refused with this text, and nothing else happens.
        """

    def values(self, params: SamplingParams) -> Sequence[float] | None:
        """What `apply` needs to know of a request: `num_values` numbers, float32 on the device. None: the request does
        not use this processor, and its logits stay as they are. Runs once a request, on the host."""
        raise NotImplementedError

    def apply(self, logits: jax.Array, values: jax.Array, history: Any) -> jax.Array:
        """New logits, as a function that JAX can trace: no Python decisions on values, no effects.

        It comes after penalties and bad words, and before thinking_token_budget, temperature and truncation.

        Args:
            logits: f32 [R, vocab_size]. Rows that do not use the processor are among them; what it makes of those is
                dropped.
            values: f32 [R, num_values], of each row what `values` gave; 0 where it gave None.
            history: The tokens of each row so far, a `vjax.sample.processors.History`: `token_ids` i32 [R, L], of which
                the first `num_tokens` i32 [R] count; the first `num_prompt_tokens` i32 [R] of them are the prompt.

        Returns:
            f32 [R, vocab_size].
        """
        raise NotImplementedError


def load_processor(named: Any) -> type[LogitsProcessor]:
    """The class, from itself or from "module:Class".

    Raises:
        ConfigError: There is no such class, or it is no `LogitsProcessor`.
    """
    found = named
    if isinstance(named, str):
        module, _, name = named.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as e:
            raise ConfigError(
                f'logits_processors has {named!r}, which cannot be imported ({e}); pass a class or "module:Class".',
                parameter="logits_processors",
                value=named,
            ) from e
    if not (isinstance(found, type) and issubclass(found, LogitsProcessor)):
        raise ConfigError(
            f"logits_processors has {named!r:.100}, which is no subclass of vjax.LogitsProcessor; pass a class or "
            '"module:Class".',
            parameter="logits_processors",
            value=named,
        )
    return found


def make_processors(named: Sequence[Any]) -> tuple[LogitsProcessor, ...]:
    """An object of each class.

    Raises:
        ConfigError: As `load_processor`, or the classes keep too many numbers.
    """
    processors = tuple(load_processor(one)() for one in named)
    if num_columns(processors) > MAX_VALUES:
        raise ConfigError(
            f"logits_processors keep {num_columns(processors)} numbers for a request; at most {MAX_VALUES} are "
            "allowed, one of them for each processor.",
            parameter="logits_processors",
        )
    return processors


def num_columns(processors: Sequence[LogitsProcessor]) -> int:
    """Numbers of a request on the device: for each processor whether it is used, then its values."""
    return sum(1 + processor.num_values for processor in processors)


def request_values(processors: Sequence[LogitsProcessor], params: SamplingParams) -> tuple[float, ...]:
    """The `num_columns` numbers of one request; empty where it uses no processor.

    Raises:
        VjaxValidationError: A processor refuses the request, or gives what is no list of its `num_values` numbers.
    """
    columns: list[float] = []
    used = False
    for processor in processors:
        name, size = type(processor).__name__, processor.num_values
        try:
            processor.validate_params(params)
            values = processor.values(params)
            numbers = [0.0] * (1 + size) if values is None else [1.0, *map(float, values)]
        except VjaxValidationError:
            raise
        except (TypeError, ValueError) as e:
            raise VjaxValidationError(
                f"{name} refuses extra_args={params.extra_args!r:.200}: {e}",
                parameter="extra_args",
                value=params.extra_args,
            ) from e
        if len(numbers) != 1 + size or not all(map(math.isfinite, numbers)):
            raise VjaxValidationError(
                f"{name}.values gave {values!r:.100}; it has to give {size} finite numbers (num_values) or None.",
                parameter="extra_args",
                value=params.extra_args,
            )
        used |= values is not None
        columns += numbers
    return tuple(columns) if used else ()
