"""The growing text of one completion: decodes tokens, looks for stop strings, and says what may be shown already."""

from __future__ import annotations

from collections.abc import Sequence

from vjax.sampling_params import SamplingParams
from vjax.text.decode_stream import DecodeStream
from vjax.text.stop_strings import StopMatch, StopStrings
from vjax.text.tokenizer import Tokenizer


def make_detokenizer(
    tokenizer: Tokenizer | None, prompt_token_ids: Sequence[int], params: SamplingParams
) -> IncrementalDetokenizer | NoDetokenizer:
    """A detokenizer for one completion; one without text if there is no tokenizer or `params.detokenize` is False."""
    if tokenizer is None or not params.detokenize:
        return NoDetokenizer()
    return IncrementalDetokenizer(tokenizer, prompt_token_ids, params)


class NoDetokenizer:
    """Collects token ids; the text stays empty."""

    __slots__ = ("token_ids",)
    text = ""

    def __init__(self) -> None:
        self.token_ids: list[int] = []

    def update(self, new_token_ids: Sequence[int], finished: bool = False, stop_terminated: bool = False) -> None:
        self.token_ids.extend(new_token_ids)

    def get_next_output_text(self, finished: bool, delta: bool) -> str:
        return ""


class IncrementalDetokenizer:
    """Token ids and text of one completion.

    Without stop strings tokens are decoded only when text is asked for, so that a request whose text is wanted at the
    end costs nothing on the way.

    `token_ids` holds all tokens, up to the one that completed a stop string. `text` leaves out the token that ended the
    request (EOS, stop_token_ids) and the stop string, unless `include_stop_str_in_output` is set.
    """

    __slots__ = (
        "_chunks",
        "_finished",
        "_hide_last",
        "_hold_back",
        "_include_stop",
        "_min_tokens",
        "_num_decoded",
        "_num_shown",
        "_stops",
        "_stream",
        "token_ids",
    )

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams):
        self.token_ids: list[int] = []
        self._stream: DecodeStream = tokenizer.decode_stream(
            prompt_token_ids, params.skip_special_tokens, params.spaces_between_special_tokens
        )
        self._stops = StopStrings(params.stop) if params.stop else None
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        # The longest beginning of a stop string that may still be taken back.
        self._hold_back = self._stops.max_length - 1 if self._stops and not self._include_stop else 0
        # The text in pieces; the first `_num_shown` of them were handed out as deltas.
        self._chunks: list[str] = []
        self._num_shown = 0
        self._num_decoded = 0
        self._hide_last = False
        self._finished = False

    def update(self, new_token_ids: Sequence[int], finished: bool = False, stop_terminated: bool = False) -> str | None:
        """Adds tokens.

        Args:
            finished: No more tokens come.
            stop_terminated: The last of these tokens is an EOS or stop token that ended the request.

        Returns:
            The stop string that matched, if one did: tokens after the one that completed it are dropped from
            `token_ids`, and nothing may be added any more.
        """
        self.token_ids.extend(new_token_ids)
        self._finished = finished
        self._hide_last = stop_terminated and not self._include_stop
        return None if self._stops is None else self._search(self._stops)

    @property
    def text(self) -> str:
        """Everything decoded so far; a character whose last byte has not come is left out until the end."""
        self._decode()
        if len(self._chunks) > 1 and self._num_shown == 0:
            self._chunks = ["".join(self._chunks)]
        return "".join(self._chunks)

    def get_next_output_text(self, finished: bool, delta: bool) -> str:
        """The text to show now: all of it, or (`delta`) what was not shown before.

        Until `finished`, the last max(len(stop)) - 1 characters are held back, since they may begin a stop string.
        """
        hold_back = 0 if finished else self._hold_back
        if not delta:
            text = self.text
            return text[: max(0, len(text) - hold_back)] if hold_back else text
        self._decode()
        pending = "".join(self._chunks[self._num_shown :])
        cut = max(0, len(pending) - hold_back)
        self._chunks[self._num_shown :] = [pending[:cut], pending[cut:]] if cut else [pending]
        self._num_shown += cut > 0
        return pending[:cut]

    def _decode(self) -> None:
        """Decodes what is not decoded yet; with stop strings `update` has done so already."""
        if self._stops is not None:
            return
        end = self._num_visible()
        if self._num_decoded < end:
            self._chunks.append("".join(map(self._stream.push, self.token_ids[self._num_decoded : end])))
            self._num_decoded = end
        if self._finished:
            self._chunks.append(self._stream.flush())

    def _search(self, stops: StopStrings) -> str | None:
        """Decodes token by token, so that a match names the token that completed it."""
        for i in range(self._num_decoded, self._num_visible()):
            self._num_decoded = i + 1
            if match := self._append(stops, self._stream.push(self.token_ids[i])):
                del self.token_ids[i + 1 :]
                return match.string
        if self._finished and (match := self._append(stops, self._stream.flush())):
            return match.string
        return None

    def _append(self, stops: StopStrings, text: str) -> StopMatch | None:
        if not text:
            return None
        match = stops.push(text, search=self._num_decoded > self._min_tokens)
        self._chunks.append(text)
        if match:
            self._drop_last(len(text) - (match.end if self._include_stop else match.start))
        return match

    def _drop_last(self, num_chars: int) -> None:
        if num_chars <= 0:
            return
        pending = "".join(self._chunks[self._num_shown :])
        assert num_chars <= len(pending), "a part of a stop string was shown"
        self._chunks[self._num_shown :] = [pending[:-num_chars]]

    def _num_visible(self) -> int:
        return len(self.token_ids) - self._hide_last
