"""Where a model's reasoning ends, by the tokens of its tags: grammars hold from there on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """What stands around reasoning, as the token ids that the tokenizer makes of it. Neither is empty.

    The rule is vLLM's: reasoning has ended when the end tag has come, and not before. What has no tag yet counts as
    reasoning, since templates may leave the start tag to the model.
    """

    start: tuple[int, ...]
    end: tuple[int, ...]

    def has_ended(self, prompt_token_ids: Sequence[int]) -> bool:
        """Whether the last tag of a prompt is the end: its template closed the reasoning for the model."""
        num_tokens = len(prompt_token_ids)
        closed = max(_ends(prompt_token_ids, self.end, 0, num_tokens), default=0)
        return closed > max(_ends(prompt_token_ids, self.start, 0, num_tokens), default=0)

    def end_of_reasoning(self, token_ids: Sequence[int], first: int) -> int | None:
        """Index behind the first end tag whose last token is `first` or a later one; None: it has not come."""
        return next(_ends(token_ids, self.end, first, len(token_ids)), None)


def _ends(token_ids: Sequence[int], tag: tuple[int, ...], first: int, stop: int) -> Iterator[int]:
    """Indices behind the occurrences of a tag whose last token is at `first` or later, and before `stop`."""
    end = first
    while True:
        try:
            end = token_ids.index(tag[-1], end, stop) + 1
        except ValueError:
            return
        if end >= len(tag) and tuple(token_ids[end - len(tag) : end]) == tag:
            yield end
