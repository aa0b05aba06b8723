"""What `tokenization_kwargs` of a prompt ask for: how text becomes token ids, and what is left out of long prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vjax.errors import VjaxValidationError
from vjax.text.tokenizer import Tokenizer

_NAMES = ("truncate_prompt_tokens", "truncation_side", "add_special_tokens")
_SIDES = (None, "left", "right")


@dataclass(frozen=True, slots=True)
class TokenizationParams:
    """Checked `tokenization_kwargs`, with vLLM's names and meaning."""

    #: Most tokens of the prompt; None: a longer one than the model takes is an error.
    max_prompt_tokens: int | None = None
    #: Where tokens are left out, of special tokens too; None: on the left, and of a text its special tokens are kept.
    truncation_side: str | None = None
    #: Add what the tokenizer adds to a text, such as BOS.
    add_special_tokens: bool = True

    @classmethod
    def from_kwargs(
        cls, kwargs: Mapping[str, Any] | None, max_model_len: int, num_output_tokens: int = 1
    ) -> TokenizationParams:
        """Checks what a user passed.

        Args:
            kwargs: "truncate_prompt_tokens" (None, a number, or -1 for as many as `max_model_len` allows),
                "truncation_side" (None, "left" or "right"), "add_special_tokens".
            max_model_len: Tokens of prompt and output.
            num_output_tokens: How many of them are left for the output.

        Raises:
            VjaxValidationError: A name is unknown or a value out of its domain.
        """
        if not kwargs:
            return _DEFAULT
        if not isinstance(kwargs, Mapping):
            allowed = f"must be a mapping with {', '.join(_NAMES)}"
            raise _error("tokenization_kwargs", kwargs, allowed)
        for name in kwargs:
            if name not in _NAMES:
                raise _error("tokenization_kwargs", kwargs, f"has the key {name!r}; only {', '.join(_NAMES)} are known")
        add_special_tokens = kwargs.get("add_special_tokens", True)
        if not isinstance(add_special_tokens, bool):
            raise _error("add_special_tokens", add_special_tokens, "must be True or False")
        side = kwargs.get("truncation_side")
        if side not in _SIDES:
            raise _error("truncation_side", side, 'must be "left" (keep the end of the prompt), "right" or None')
        number = kwargs.get("truncate_prompt_tokens")
        if number is not None:
            number = _max_prompt_tokens(number, max_model_len, max_model_len - num_output_tokens)
        return cls(number, side, add_special_tokens)

    def encode(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Token ids of a text, at most `max_prompt_tokens`."""
        if self.max_prompt_tokens is None or self.truncation_side is not None:
            return self.truncate(tokenizer.encode(text, self.add_special_tokens))
        return self.truncate(tokenizer.encode(text, self.add_special_tokens, self.max_prompt_tokens))

    def encode_pair(self, tokenizer: Tokenizer, text: str, pair: str) -> list[int]:
        """Token ids of two texts in one prompt, at most `max_prompt_tokens`."""
        return self.truncate(tokenizer.encode_pair(text, pair, self.add_special_tokens))

    def truncate(self, token_ids: list[int]) -> list[int]:
        """At most `max_prompt_tokens` of the ids: the last, or with side "right" the first."""
        if self.max_prompt_tokens is None or len(token_ids) <= self.max_prompt_tokens:
            return token_ids
        if self.truncation_side == "right":
            return token_ids[: self.max_prompt_tokens]
        return token_ids[-self.max_prompt_tokens :]


_DEFAULT = TokenizationParams()


def _max_prompt_tokens(value: Any, max_model_len: int, longest: int) -> int:
    try:
        number = None if isinstance(value, bool) else value.__index__()
    except (AttributeError, TypeError):
        number = None
    if number is None or not (number == -1 or 1 <= number <= max_model_len):
        allowed = f"must be an integer in [1, {max_model_len}] (max_model_len), or -1 for as many tokens as fit"
        raise _error("truncate_prompt_tokens", value, allowed)
    return longest if number == -1 else min(number, longest)


def _error(name: str, value: object, what: str) -> VjaxValidationError:
    return VjaxValidationError(f"{name}={value!r:.100} {what}.", parameter=name, value=value)
