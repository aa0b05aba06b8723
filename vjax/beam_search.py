"""Beam search as a front end's loop: each step, every beam is a request for one token with log probabilities.

    BeamSearch.beams --prompts--> engine --top 2 * beam_width of each--> BeamSearch.take

`LLM.beam_search` runs the loop for a batch of prompts, `AsyncLLM.beam_search` for one of many callers. The beams of a
prompt share its KV blocks, and those of what they have in common, through the prefix cache.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vjax.config.engine_config import ModelConfig
from vjax.errors import VjaxValidationError
from vjax.logprobs import Logprob
from vjax.outputs import CompletionOutput
from vjax.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams


@dataclass(slots=True)
class BeamSearchSequence:
    """One beam."""

    #: The prompt, then what was found; with the EOS that ended it.
    tokens: list[int]
    #: Of each found token: what the engine said of it and of the most probable ones beside it.
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    #: Sum of the log probabilities of the found tokens.
    cum_logprob: float = 0.0
    #: Of all tokens, the prompt's too; None while the search goes on, and without a tokenizer.
    text: str | None = None
    #: "stop" (EOS), "length" (max_tokens or the model's context), "error" (of the device) or "abort"; None while it
    #: goes on.
    finish_reason: str | None = None
    #: The EOS token id, with "stop".
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """Of one prompt: at most `beam_width` sequences, best first."""

    sequences: list[BeamSearchSequence]


def check_beam_search(params: Any, model: ModelConfig) -> None:
    """Raises: VjaxValidationError where `params` are no BeamSearchParams, or the engine's logprobs_mode or max_logprobs
    do not permit them."""
    if not isinstance(params, BeamSearchParams):
        raise VjaxValidationError(
            f"params={params!r:.100} is a {type(params).__name__}; pass a BeamSearchParams.",
            parameter="params",
            value=params,
        )
    needed = 2 * params.beam_width
    if -1 < model.max_logprobs < needed:
        raise VjaxValidationError(
            f"beam_width={params.beam_width} needs the {needed} most probable tokens of each step, and the engine "
            f"gives {model.max_logprobs}; choose a smaller beam_width, or create the engine with "
            f"max_logprobs={needed}.",
            parameter="beam_width",
            value=params.beam_width,
        )
    if not model.logprobs_mode.endswith("logprobs"):
        raise VjaxValidationError(
            f"beam_search adds log probabilities, and the engine gives logits: logprobs_mode="
            f'{model.logprobs_mode!r}; create it with "raw_logprobs" or "processed_logprobs".',
            parameter="logprobs_mode",
            value=model.logprobs_mode,
        )


class BeamSearch:
    """The search for one prompt, as vLLM defines it.

    Each step takes the 2 * beam_width most probable tokens after each beam. What ends in EOS is completed; of the rest
    the `beam_width` most probable go on. The best of completed and unfinished sequences by

        cum_logprob / (tokens, with the prompt's and without EOS) ** length_penalty

    are the result. EOS is the tokenizer's; the further ids of generation_config.json are tokens like others.

    The beams are those of Hugging Face's `generate(num_beams=beam_width)`. The result is too, in the same order, where
    nothing ends in EOS (ignore_eos). Where something does, Hugging Face differs in three points:
    - It divides by the number of found tokens, with EOS; with length_penalty 0 it is all the same.
    - It completes a sequence only if that is among the `beam_width` best of its step. Here each one is completed.
    - It stops when `early_stopping` expects no better sequence. Here the search stops when there can be none, as with
      early_stopping="never" and length_penalty 0.
    """

    def __init__(
        self, prompt_token_ids: Sequence[int], params: BeamSearchParams, eos_token_id: int | None, max_model_len: int
    ):
        self._params = params
        self._eos_token_id = None if params.ignore_eos else eos_token_id
        self._max_num_tokens = min(len(prompt_token_ids) + params.max_tokens, max_model_len)
        self._completed: list[BeamSearchSequence] = []
        #: Beams that wait for their next token, most probable first; empty when the search is over.
        self.beams = [BeamSearchSequence(list(prompt_token_ids))]
        #: Of each request for a beam's next token.
        self.request_params = SamplingParams(
            max_tokens=1,
            logprobs=2 * params.beam_width,
            temperature=params.temperature,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def take(self, completions: Sequence[CompletionOutput]) -> None:
        """One step: the completion of each of `beams`, in their order. Where one has none the search is over."""
        candidates = [completion.logprobs[0] for completion in completions if completion.logprobs]
        if len(candidates) == len(completions):
            self.extend(candidates)
        else:
            self.end(next(c.finish_reason or "error" for c in completions if not c.logprobs))

    def extend(self, candidates: Sequence[dict[int, Logprob]]) -> None:
        """One step: what may follow each of `beams`, in their order, token id -> log probability."""
        found: list[tuple[float, int, int]] = []
        for i, (beam, entry) in enumerate(zip(self.beams, candidates, strict=True)):
            for token_id, logprob in entry.items():
                total = beam.cum_logprob + logprob.logprob
                if token_id == self._eos_token_id:
                    self._completed.append(self._continued(i, token_id, total, candidates))
                    self._completed[-1].finish_reason, self._completed[-1].stop_reason = "stop", token_id
                else:
                    found.append((total, i, token_id))
        width = self._params.beam_width
        best = heapq.nlargest(width, found, key=lambda candidate: candidate[0])
        self.beams = [self._continued(i, token_id, total, candidates) for total, i, token_id in best]
        self._completed = heapq.nlargest(width, self._completed, key=self._score)
        if self.beams and len(self.beams[0].tokens) >= self._max_num_tokens:
            self.end("length")
        elif not self._may_improve():
            self.beams = []

    def end(self, reason: str) -> None:
        """Ends the search with what it has; `reason` is the finish_reason of the beams."""
        for beam in self.beams:
            beam.finish_reason = reason
        self._completed = heapq.nlargest(self._params.beam_width, [*self._completed, *self.beams], key=self._score)
        self.beams = []

    def output(self, decode: Callable[..., str] | None) -> BeamSearchOutput:
        """The result. The search is over.

        Args:
            decode: The tokenizer's method; None: sequences get no texts.
        """
        assert not self.beams
        if decode is not None:
            for sequence in self._completed:
                self._add_texts(sequence, decode)
        return BeamSearchOutput(self._completed)

    def _add_texts(self, sequence: BeamSearchSequence, decode: Callable[..., str]) -> None:
        hides_last = sequence.finish_reason == "stop" and not self._params.include_stop_str_in_output
        shown = sequence.tokens[: -1 if hides_last else None]
        sequence.text = decode(shown, skip_special_tokens=self._params.skip_special_tokens)
        for entry in sequence.logprobs:
            for token_id, logprob in entry.items():
                if logprob.decoded_token is None:
                    logprob.decoded_token = decode([token_id], skip_special_tokens=False)

    def _continued(
        self, i: int, token_id: int, total: float, candidates: Sequence[dict[int, Logprob]]
    ) -> BeamSearchSequence:
        beam = self.beams[i]
        return BeamSearchSequence([*beam.tokens, token_id], [*beam.logprobs, candidates[i]], total)

    def _score(self, sequence: BeamSearchSequence) -> float:
        num_tokens = len(sequence.tokens) - (sequence.finish_reason == "stop")
        return sequence.cum_logprob / num_tokens**self._params.length_penalty

    def _may_improve(self) -> bool:
        """Whether anything that the beams can become may be better than the worst of the result."""
        if not self.beams or len(self._completed) < self._params.beam_width:
            return bool(self.beams)
        penalty = self._params.length_penalty
        num_tokens = self._max_num_tokens if penalty > 0 else len(self.beams[0].tokens)
        # Log probabilities are at most 0: sums only fall.
        return self.beams[0].cum_logprob / num_tokens**penalty > self._score(self._completed[-1])
