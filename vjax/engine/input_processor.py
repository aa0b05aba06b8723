"""Prompts to engine requests: tokenises, checks, fills in what the user left open, and expands n > 1.

prompt + SamplingParams -> ProcessedRequest(text, ids, params, [EngineRequest, ...])
"""

from __future__ import annotations

import copy
import random
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from vjax.config.engine_config import EngineConfig
from vjax.config.pooler import Pooling
from vjax.engine.grammars import eos_token_ids as find_eos_token_ids
from vjax.engine.grammars import make_compiler
from vjax.engine.pooling import ProcessedPooling, complete_params, pooling_type
from vjax.engine.tokenization import TokenizationParams
from vjax.errors import VjaxValidationError
from vjax.log import logger, warning_once
from vjax.logits_processor import make_processors, request_values
from vjax.messages import EngineRequest
from vjax.pooling_params import PoolingParams
from vjax.sampling_params import SamplingParams
from vjax.structured.compiler import GrammarCompiler
from vjax.structured.grammar import grammar_text, refused
from vjax.text.tokenizer import Tokenizer

#: Tokens of all bad words of a request, spelled with and without a space before them.
MAX_BAD_WORDS_TOKENS = 1024
#: EOS and stop ids that a device row can mask while min_tokens is not reached.
MAX_MASKED_TOKEN_IDS = 64
#: By whether it skips reading the prefix cache: what a pooling request, which samples nothing, has in place of
#: sampling parameters.
_OF_POOLING = {skips: SamplingParams(max_tokens=1, skip_reading_prefix_cache=skips) for skips in (False, True)}
_PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
_PROMPT_FORMS = 'a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": [...]}'


_log = logger("engine")


@dataclass(slots=True)
class ProcessedRequest:
    """One prompt, ready for the engine core."""

    request_id: str
    #: None where only token ids were given.
    prompt: str | None
    prompt_token_ids: list[int]
    #: As given, with every open value filled in; n as the user set it.
    params: SamplingParams
    #: One per completion, in the order of their index.
    requests: list[EngineRequest]
    #: Monotonic seconds.
    arrival_time: float


class InputProcessor:
    """Turns what a user passes into requests that the engine core can run without further checks."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        vocab_size: int,
        tokenizer: Tokenizer | None,
        eos_token_ids: Sequence[int] = (),
        grammars: GrammarCompiler | None = None,
    ):
        """
        Args:
            vocab_size: Rows of the model's embedding: ids must be below it.
            tokenizer: None: prompts must be token ids.
            eos_token_ids: The model's own, from config.json. The first one is used where there is no tokenizer, or the
                tokenizer has no EOS.
            grammars: The compiler of the core that gets the requests; None: one of its own, where the core is in
                another process.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._pooling = config.model.pooling
        self._max_model_len = config.model.max_model_len
        self._max_logprobs = config.model.max_logprobs
        self._logits_processors = make_processors(config.model.logits_processors)
        self._can_end_thinking = config.model.thinking_tags is not None
        self._has_priorities = config.scheduler.policy == "priority"
        self._defaults = config.model.default_sampling_params
        self._grammars = grammars or make_compiler(
            lambda: tokenizer, config, vocab_size=vocab_size, model_eos_token_ids=eos_token_ids
        )
        self.eos_token_id, self._extra_eos_token_ids = find_eos_token_ids(tokenizer, config, eos_token_ids)
        eos = self.eos_token_id
        self._eos_token_ids = self._extra_eos_token_ids if eos is None else (eos, *self._extra_eos_token_ids)
        # Seeds of requests that bring none: reproducible for equal calls on engines of equal seed.
        self._seeds = random.Random(config.model.seed)

    def default_sampling_params(self) -> SamplingParams:
        """What a call without sampling parameters uses: generation_config.json's values over vLLM's defaults."""
        return SamplingParams(**self._defaults)

    def process(
        self,
        request_id: str,
        prompt: str | Mapping[str, Any] | Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        arrival_time: float = 0.0,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> ProcessedRequest:
        """Checks and completes one prompt.

        Args:
            prompt: Text, token ids, or a mapping with "prompt" (text) and/or "prompt_token_ids" (which win), and
                optionally "cache_salt" (only prompts of the same salt share cached KV).
            priority: Lower runs first, with scheduling_policy="priority".
            arrival_time: Monotonic seconds.
            tokenization_kwargs: See `TokenizationParams`.

        Raises:
            VjaxValidationError: The prompt is empty, too long or out of the vocabulary, or the parameters do not fit.
        """
        if not isinstance(params, SamplingParams):
            raise _error("sampling_params", params, f"is a {type(params).__name__}; pass a SamplingParams")
        if self._pooling is not None:
            raise VjaxValidationError(
                "This engine pools and generates no text: use embed, encode, classify or score, or create it with "
                "runner='generate'.",
                parameter="sampling_params",
            )
        check_request_id(request_id)
        self._check_priority(priority)
        tokenization = TokenizationParams.from_kwargs(tokenization_kwargs, self._max_model_len)
        text, token_ids, salt = self._parse(prompt, tokenization)
        self._check_length(token_ids)
        complete = self._complete_params(params, len(token_ids))
        bad_words = self._bad_words(complete)
        processor_values = self._processor_values(complete)
        grammar = self._grammar(complete)
        requests = [
            EngineRequest(
                request_id=child_id,
                prompt_token_ids=token_ids,
                sampling_params=child_params,
                eos_token_id=None if complete.ignore_eos else self.eos_token_id,
                ignored_eos_token_ids=self._eos_token_ids if complete.ignore_eos else (),
                arrival_time=arrival_time,
                priority=priority,
                cache_salt=salt,
                bad_words_token_ids=bad_words,
                processor_values=processor_values,
                grammar=grammar,
            )
            for child_id, child_params in _expand(request_id, complete)
        ]
        return ProcessedRequest(request_id, text, token_ids, complete, requests, arrival_time)

    def process_pooling(
        self,
        request_id: str,
        prompt: str | Mapping[str, Any] | Sequence[int],
        params: PoolingParams,
        *,
        priority: int = 0,
        arrival_time: float = 0.0,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> ProcessedPooling:
        """As `process`, for a model that pools. The prompt may be as long as the model's context.

        Raises:
            VjaxValidationError: As `process`; or the engine generates.
        """
        pooling = self.pooling(params)
        check_request_id(request_id)
        self._check_priority(priority)
        text, token_ids, salt = self._parse(prompt, self._pooling_tokenization(params, tokenization_kwargs))
        self._check_length(token_ids)
        complete = complete_params(params, pooling)
        kind = pooling_type(complete, pooling)
        skips = complete.skip_reading_prefix_cache
        if skips is False and kind != "LAST":
            raise _error("skip_reading_prefix_cache", skips, f"is impossible: pooling {kind} needs every token")
        request = EngineRequest(
            request_id=request_id,
            prompt_token_ids=token_ids,
            sampling_params=_OF_POOLING[bool(skips) or kind != "LAST"],
            eos_token_id=None,
            arrival_time=arrival_time,
            priority=priority,
            cache_salt=salt,
            pooling_type=kind,
        )
        return ProcessedPooling(request_id, text, token_ids, complete, [request], arrival_time)

    def pooling(self, params: PoolingParams) -> Pooling:
        """How the engine pools.

        Raises:
            VjaxValidationError: It generates, or `params` are no PoolingParams.
        """
        if not isinstance(params, PoolingParams):
            raise _error("pooling_params", params, f"is a {type(params).__name__}; pass a PoolingParams")
        if self._pooling is None:
            raise VjaxValidationError(
                "This engine generates text and does not pool: create it with runner='pooling' (and convert='embed' "
                "for embeddings of a model that was made to generate).",
                parameter="pooling_params",
            )
        return self._pooling

    def tokenize_pair(
        self, text: str, pair: str, params: PoolingParams, tokenization_kwargs: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of two texts in one prompt, for a model that scores pairs.

        Raises:
            VjaxValidationError: There is no tokenizer, or one of the two is no text.
        """
        if self._tokenizer is None:
            raise VjaxValidationError("Pairs of texts need a tokenizer; leave out skip_tokenizer_init.")
        tokenization = self._pooling_tokenization(params, tokenization_kwargs)
        return self._in_vocabulary(tokenization.encode_pair(self._tokenizer, text, pair))

    def _pooling_tokenization(self, params: PoolingParams, kwargs: Mapping[str, Any] | None) -> TokenizationParams:
        if params.truncate_prompt_tokens is not None and isinstance(kwargs, (Mapping, type(None))):
            kwargs = {"truncate_prompt_tokens": params.truncate_prompt_tokens, **(kwargs or {})}
        return TokenizationParams.from_kwargs(kwargs, self._max_model_len, num_output_tokens=0)

    def tokenize(
        self, prompt: str | Mapping[str, Any] | Sequence[int], tokenization_kwargs: Mapping[str, Any] | None = None
    ) -> tuple[list[int], str | None]:
        """Token ids and cache salt of a prompt, checked as `process` does.

        Raises:
            VjaxValidationError: As `process`, of the prompt.
        """
        tokenization = TokenizationParams.from_kwargs(tokenization_kwargs, self._max_model_len)
        _, token_ids, salt = self._parse(prompt, tokenization)
        self._check_length(token_ids)
        return token_ids, salt

    # ---- prompts --------------------------------------------------------------------------------------------------

    def _parse(self, prompt: Any, tokenization: TokenizationParams) -> tuple[str | None, list[int], str | None]:
        """Text (None if only ids were given), token ids and cache salt."""
        if isinstance(prompt, str):
            return prompt, self._encode(prompt, tokenization), None
        if not isinstance(prompt, Mapping):
            return None, tokenization.truncate(self._token_ids(prompt)), None
        for key, value in prompt.items():
            if key not in _PROMPT_KEYS and value is not None:
                hint = "; LLM.chat takes messages" if key in ("role", "messages") else ""
                raise _error(
                    "prompt", prompt, f"has the key {key!r}; only {', '.join(_PROMPT_KEYS)} are supported{hint}"
                )
        text, token_ids, salt = (prompt.get(key) for key in _PROMPT_KEYS)
        if salt is not None and not (isinstance(salt, str) and salt):
            raise _error("cache_salt", salt, "must be a non-empty string; leave it out to share cached prefixes freely")
        if text is not None and not isinstance(text, str):
            raise _error("prompt", text, f"must be a text; it is a {type(text).__name__}")
        if token_ids is not None:
            return text, tokenization.truncate(self._token_ids(token_ids)), salt
        if text is None:
            raise _error("prompt", prompt, f"has neither a prompt nor prompt_token_ids; pass {_PROMPT_FORMS}")
        return text, self._encode(text, tokenization), salt

    def _encode(self, text: str, tokenization: TokenizationParams) -> list[int]:
        if self._tokenizer is None:
            raise _error(
                "prompt",
                text,
                "is a text, but the engine was created with skip_tokenizer_init=True and has no tokenizer; pass "
                '{"prompt_token_ids": [...]}, or create the engine with skip_tokenizer_init=False',
            )
        if not text:
            raise _empty(text)
        ids = tokenization.encode(self._tokenizer, text)
        if not ids:
            raise _empty(text)
        return self._in_vocabulary(ids)

    def _token_ids(self, value: Any) -> list[int]:
        if hasattr(value, "tolist"):  # numpy
            value = value.tolist()
        if not isinstance(value, (list, tuple, range)):
            raise _error("prompt", value, f"is a {type(value).__name__}; pass {_PROMPT_FORMS}")
        ids = list(value)
        if not ids:
            raise _empty(value)
        if list(map(type, ids)).count(int) < len(ids):
            ids = [_integer(i) for i in ids]
        return self._in_vocabulary(ids)

    def _in_vocabulary(self, ids: list[int]) -> list[int]:
        try:  # A third of the time of min and max of a long list.
            array = np.frombuffer(struct.pack(f"{len(ids)}q", *ids), np.int64)
        except struct.error:  # more than 64 bits
            array = np.array([-1])
        if array.min() < 0 or array.max() >= self._vocab_size:
            raise self._out_of_vocabulary("prompt_token_ids", ids)
        return ids

    def _out_of_vocabulary(self, name: str, ids: Sequence[int]) -> VjaxValidationError:
        wrong = next(i for i in ids if not 0 <= i < self._vocab_size)
        return _error(
            name,
            wrong,
            f"is out of vocabulary: the model's {self._vocab_size} token ids are 0..{self._vocab_size - 1}; check that "
            "the tokenizer belongs to the model",
        )

    def _check_length(self, token_ids: list[int]) -> None:
        if self._pooling is not None:
            if len(token_ids) > self._max_model_len:
                raise VjaxValidationError(
                    f"The prompt (length {len(token_ids)}) is longer than the maximum model length of "
                    f"{self._max_model_len}. Shorten it, pass truncate_prompt_tokens, or raise max_model_len if the "
                    "model allows it.",
                    parameter="prompt",
                    value=len(token_ids),
                )
            return
        if len(token_ids) >= self._max_model_len:
            raise VjaxValidationError(
                f"The prompt (length {len(token_ids)}) plus the number of requested output tokens (at least 1) is "
                f"longer than the maximum model length of {self._max_model_len}. Shorten the prompt, or raise "
                "max_model_len if the model allows it.",
                parameter="prompt",
                value=len(token_ids),
            )

    def _check_priority(self, priority: Any) -> None:
        if not isinstance(priority, int):
            raise _error("priority", priority, "must be an integer; lower runs first")
        if priority and not self._has_priorities:
            warning_once(_log, 'priorities have no effect: create the engine with scheduling_policy="priority"')

    # ---- sampling parameters --------------------------------------------------------------------------------------

    def _complete_params(self, params: SamplingParams, prompt_len: int) -> SamplingParams:
        """A validated copy in which max_tokens and seed are numbers and the stop ids are complete."""
        if params.stop and self._tokenizer is None:
            raise _error(
                "stop",
                params.stop,
                "needs a tokenizer, and the engine was created with skip_tokenizer_init=True; use stop_token_ids",
            )
        params = params.clone()
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias", "logprob_token_ids"):
            ids = getattr(params, name) or ()
            if any(i >= self._vocab_size for i in ids):
                raise self._out_of_vocabulary(name, list(ids))
        self._check_num_logprobs(params)
        if not params.ignore_eos:
            params.add_stop_token_ids(self._extra_eos_token_ids)
        if params.max_tokens is None:
            params.max_tokens = self._max_model_len - prompt_len
        if params.seed is None:
            params.seed = self._seeds.getrandbits(63)
        if params.min_tokens:
            self._check_num_masked(params)
        if params.thinking_token_budget is not None and not self._can_end_thinking:
            raise _error(
                "thinking_token_budget",
                params.thinking_token_budget,
                "needs to know what ends reasoning; create the engine with reasoning_config={} for <think> and "
                '</think>, or with {"reasoning_start_str": ..., "reasoning_end_str": ...}',
            )
        return params

    def _processor_values(self, params: SamplingParams) -> tuple[float, ...]:
        if params.extra_args and not self._logits_processors:
            raise _error(
                "extra_args",
                params.extra_args,
                "are for logits processors, and the engine has none; create it with logits_processors=[...]",
            )
        return request_values(self._logits_processors, params)

    def _check_num_logprobs(self, params: SamplingParams) -> None:
        most = self._max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            if asked is None or most == -1 or 0 <= asked <= most:
                continue
            wanted = "the whole vocabulary" if asked == -1 else str(asked)
            raise _error(
                name,
                asked,
                f"asks for {wanted}, and max_logprobs is {most}; ask for less, or raise max_logprobs (-1: all)",
            )

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Each text as the tokens that spell it at the beginning of a text and behind a space."""
        if not params.bad_words:
            return ()
        if self._tokenizer is None:
            raise _error(
                "bad_words",
                params.bad_words,
                "needs a tokenizer, and the engine was created with skip_tokenizer_init=True; use logit_bias",
            )
        words: list[tuple[int, ...]] = []
        for text in params.bad_words:
            plain = self._tokenizer.encode(text.lstrip(), add_special_tokens=False)
            spaced = self._tokenizer.encode(" " + text.lstrip(), add_special_tokens=False)
            words.append(tuple(plain))
            # Only where the space changes the first token, not where it is one of its own.
            if len(spaced) == len(plain) and spaced[0] != plain[0]:
                words.append(tuple(spaced))
        if (count := sum(map(len, words))) > MAX_BAD_WORDS_TOKENS:
            allowed = f"are {count} tokens; at most {MAX_BAD_WORDS_TOKENS} are allowed"
            raise _error("bad_words", params.bad_words, allowed)
        return tuple(dict.fromkeys(words))

    def _grammar(self, params: SamplingParams) -> str | None:
        asked = params.structured_outputs
        if asked is None:
            return None
        text = grammar_text(asked, self._tokenizer.all_special_tokens if self._tokenizer is not None else ())
        try:
            self._grammars.matcher(text)
        except VjaxValidationError as e:
            raise refused(asked, e) from e
        return text

    def _check_num_masked(self, params: SamplingParams) -> None:
        masked = {*(params.stop_token_ids or ()), *self._eos_token_ids}
        if len(masked) > MAX_MASKED_TOKEN_IDS:
            raise _error(
                "min_tokens",
                params.min_tokens,
                f"works with at most {MAX_MASKED_TOKEN_IDS} EOS and stop token ids, and the request has {len(masked)}; "
                "pass fewer stop_token_ids, or min_tokens=0",
            )


def check_request_id(request_id: Any) -> None:
    """Raises: VjaxValidationError for what is no id."""
    if not isinstance(request_id, str) or not request_id:
        raise _error("request_id", request_id, "must be a non-empty string")


def _expand(request_id: str, params: SamplingParams) -> list[tuple[str, SamplingParams]]:
    """Id and parameters of each completion's own request. `params.seed` is a number."""
    if params.n == 1:
        return [(request_id, params)]
    assert params.seed is not None
    children = []
    for i in range(params.n):
        child = copy.copy(params)
        child.n = 1
        if i:
            child.prompt_logprobs = None  # they are the first one's
        child.seed = (params.seed + i + 2**63) % 2**64 - 2**63  # stays a signed 64-bit integer
        children.append((f"{i}_{request_id}", child))
    return children


def _integer(value: Any) -> int:
    """A numpy integer as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _error("prompt_token_ids", value, f"is a {type(value).__name__}; token ids must be integers")
    return int(value)


def _empty(value: object) -> VjaxValidationError:
    return VjaxValidationError(
        "The prompt cannot be empty: it needs at least 1 token. For text from nothing, pass the BOS token's id.",
        parameter="prompt",
        value=value,
    )


def _error(name: str, value: object, what: str) -> VjaxValidationError:
    return VjaxValidationError(f"{name}={value!r:.100} {what}.", parameter=name, value=value)
