"""How the next token is drawn, and when a request ends: names, defaults and domains as in vLLM's `SamplingParams`."""

from __future__ import annotations

import dataclasses
import enum
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from vjax.errors import VjaxValidationError
from vjax.log import logger, warning_once
from vjax.structured_outputs import StructuredOutputsParams

#: Below this temperature a request is greedy.
GREEDY_TEMPERATURE = 1e-5
#: Positive temperatures below this one are raised to it: smaller ones overflow the scaled logits.
MIN_TEMPERATURE = 0.01
MAX_TEMPERATURE = 2.0
#: Upper limit of `n`.
MAX_N = 16384
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_BAD_WORDS = 128
MAX_LOGPROB_TOKEN_IDS = 128
MAX_THINKING_TOKEN_BUDGET = 2**30

_log = logger("sampling_params")


class RequestOutputKind(enum.Enum):
    """What each `RequestOutput` of a request holds."""

    #: Everything generated so far.
    CUMULATIVE = 0
    #: What is new since the last output.
    DELTA = 1
    #: One output, when the request is finished.
    FINAL_ONLY = 2


@dataclass(frozen=True, slots=True)
class RepetitionDetectionParams:
    """Ends a completion that goes round in circles: finish_reason "repetition", stop_reason "repetition_detected".

    It ends when the latest tokens are one pattern, `min_pattern_size` to `max_pattern_size` tokens long, `min_count`
    times in a row. Only generated tokens count, and none before `min_tokens` of them.

    Raises:
        VjaxValidationError: A number is out of its domain.
    """

    #: Tokens of the longest pattern that is looked for; 0 switches the detection off.
    max_pattern_size: int = 0
    #: Tokens of the shortest one, at most `max_pattern_size`; 0 means 1.
    min_pattern_size: int = 0
    #: Repetitions that end the completion; at least 2, where `max_pattern_size` is not 0.
    min_count: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            number = _int(self, field.name, 0, None, "see RepetitionDetectionParams")
            object.__setattr__(self, field.name, number)
        if self.min_pattern_size > self.max_pattern_size:
            allowed = f"must be at most max_pattern_size={self.max_pattern_size}; set both to 0 to switch it off"
            raise _error("min_pattern_size", self.min_pattern_size, allowed)
        if self.max_pattern_size and self.min_count < 2:
            allowed = "must be at least 2, since a pattern has to repeat; max_pattern_size=0 switches the detection off"
            raise _error("min_count", self.min_count, allowed)

    @property
    def is_on(self) -> bool:
        return self.max_pattern_size > 0

    @property
    def min_num_tokens(self) -> int:
        """Fewest tokens that can end a completion: the shortest pattern, `min_count` times."""
        return max(self.min_pattern_size, 1) * self.min_count


@dataclass(slots=True, repr=False)
class SamplingParams:
    """Sampling and stopping rules of one prompt.

    Raises:
        VjaxValidationError: A value is out of its domain, or belongs to a feature that does not work yet. The text
            names the value, what is allowed and what to do.

    Greedy (`temperature` 0) means that top_p, top_k and min_p have no effect: they are set to 1, 0 and 0.
    """

    #: Completions per prompt, 1..16384; must be 1 when greedy. Completion i is drawn with `seed + i`.
    n: int = 1
    #: Subtracted from the logit of every token that is in the output, in [-2, 2].
    presence_penalty: float = 0.0
    #: Subtracted as often as the token is in the output, in [-2, 2].
    frequency_penalty: float = 0.0
    #: Divides positive and multiplies negative logits of tokens in prompt or output; above 0, 1 is off.
    repetition_penalty: float = 1.0
    #: 0 (greedy) to 2; values in (0, 0.01) are raised to 0.01.
    temperature: float = 1.0
    #: Smallest set of tokens whose probability reaches this, in (0, 1]; 1 is off.
    top_p: float = 1.0
    #: Number of most probable tokens to draw from; 0 or -1 is off.
    top_k: int = 0
    #: Least probability relative to the most probable token's, after temperature, in [0, 1]; 0 is off.
    min_p: float = 0.0
    #: A 64-bit integer; None or -1: the engine draws one.
    seed: int | None = None
    #: Strings that end the text; a list after construction.
    stop: str | list[str] | None = None
    #: Token ids that end the request and stay in `token_ids`; a list without repetitions after construction.
    stop_token_ids: list[int] | None = None
    #: Go on after an end-of-sequence token, generation_config.json's further ones included.
    ignore_eos: bool = False
    #: At least 1; None: as many as fit in the model's context.
    max_tokens: int | None = 16
    #: Before this many tokens EOS and `stop_token_ids` cannot be drawn and `stop` is not searched.
    min_tokens: int = 0
    #: Most probable tokens whose log probabilities come with each token, beside the token's own: 0 for that alone, up
    #: to the engine's max_logprobs, -1 for the whole vocabulary.
    logprobs: int | None = None
    #: The same for the tokens of the prompt, but the first. The prompt's blocks are not taken from the prefix cache.
    prompt_logprobs: int | None = None
    #: At most 128 ids whose log probabilities come with each token.
    logprob_token_ids: list[int] | None = None
    prompt_logprob_token_ids: list[int] | None = None
    prompt_logprob_start: int | None = None
    #: Both come as `FlatLogprobs`: lists of numbers instead of a dict per token.
    flat_logprobs: bool = False
    #: False: `text` stays empty; `stop` then cannot be used.
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    #: At least 1: tokens between two streamed outputs, after the first, which comes at once. None, or less than the
    #: engine's `stream_interval`: the engine's.
    stream_interval: int | None = None
    #: The form that the text must have; a mapping of the fields is accepted too. EOS is drawn only where it may end.
    #: With the engine's `reasoning_config` it is the form of what follows the reasoning.
    structured_outputs: StructuredOutputsParams | None = None
    #: Token id -> what is added to its logit, clamped to [-100, 100]; at most 1024.
    logit_bias: dict[int, float] | None = None
    #: No other token is drawn.
    allowed_token_ids: list[int] | None = None
    #: At most 128 texts that the output must not contain, each with and without a space before it.
    bad_words: list[str] | None = None
    #: Compute the whole prompt, also what the prefix cache has; its blocks are cached for others all the same.
    skip_reading_prefix_cache: bool | None = None
    #: At least 0: after so many tokens of reasoning its end is forced. Needs the engine's `reasoning_config`.
    thinking_token_budget: int | None = None
    #: When to end a completion that repeats itself; a mapping of the fields is accepted too.
    repetition_detection: RepetitionDetectionParams | None = None
    #: For the engine's `logits_processors`, which say what they take.
    extra_args: dict[str, Any] | None = None
    watermarking: Any = None
    routed_experts_prompt_start: int | None = None
    trace_decode_token_ids: list[int] | None = None
    skip_clone: bool = False

    def __post_init__(self) -> None:
        self._refuse_unsupported()
        self._check_sampling()
        self._check_processors()
        self._check_logprobs()
        self._check_lengths()
        self._check_text_options()
        self._check_host_options()
        if self.is_greedy:
            self._make_greedy()

    @classmethod
    def from_optional(cls, **fields: Any) -> SamplingParams:
        """Like the constructor, but None means the default for every field (`max_tokens` 16 included).

        Raises:
            VjaxValidationError: As the constructor.
            TypeError: A name is not a field.
        """
        return cls(**{name: value for name, value in fields.items() if value is not None})

    def __repr__(self) -> str:
        """The fields that differ from their defaults."""
        shown = [f"{name}={value!r}" for name, default in _REPR_DEFAULTS if (value := getattr(self, name)) != default]
        return f"SamplingParams({', '.join(shown)})"

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def wants_logprobs(self) -> bool:
        """Whether each token of the output comes with log probabilities."""
        return self.logprobs is not None or bool(self.logprob_token_ids)

    @property
    def all_stop_token_ids(self) -> frozenset[int]:
        """`stop_token_ids` as a set, built on each call."""
        return frozenset(self.stop_token_ids or ())

    @property
    def reads_prefix_cache(self) -> bool:
        """Whether cached blocks are used; by default not with `prompt_logprobs`, which need the whole prompt."""
        if self.skip_reading_prefix_cache is None:
            return self.prompt_logprobs is None
        return not self.skip_reading_prefix_cache

    def clone(self) -> SamplingParams:
        """A copy that shares no list with the original. Values assigned after construction are validated here."""
        return dataclasses.replace(self)

    def add_stop_token_ids(self, token_ids: Iterable[int]) -> None:
        """Appends ids that are not there yet; used for the further EOS ids of generation_config.json."""
        present = self.stop_token_ids or []
        self.stop_token_ids = list(dict.fromkeys([*present, *token_ids]))

    def _refuse_unsupported(self) -> None:
        for name, default in _UNSUPPORTED.items():
            value = getattr(self, name)
            if value is default:
                continue
            if type(value) in (bool, int, float) and type(default) in (bool, int, float) and value == default:
                continue
            raise _error(name, value, f"is not supported yet; leave it at its default {default!r}")

    def _check_sampling(self) -> None:
        self.n = _int(self, "n", 1, MAX_N, "ask for fewer completions per prompt, or pass the prompt more often")
        self.temperature = _float(
            self, "temperature", 0.0, MAX_TEMPERATURE, "use 0 for greedy decoding, about 0.7 to 1 for sampling"
        )
        if 0 < self.temperature < MIN_TEMPERATURE:
            warning_once(
                _log,
                f"temperature={self.temperature} is raised to {MIN_TEMPERATURE}, "
                "since smaller values overflow; use 0 for greedy decoding",
            )
            self.temperature = MIN_TEMPERATURE
        self.top_p = _float(self, "top_p", 0.0, 1.0, "use 1 to switch it off", low_open=True)
        self.top_k = max(_int(self, "top_k", -1, None, "use 0 to switch it off"), 0)
        self.min_p = _float(self, "min_p", 0.0, 1.0, "use 0 to switch it off")
        if self.seed is not None:
            seed = _int(self, "seed", -(2**63), 2**63 - 1, "use None (null in YAML) to have one drawn")
            self.seed = None if seed == -1 else seed

    def _check_processors(self) -> None:
        self.presence_penalty = _float(self, "presence_penalty", -2.0, 2.0, "use 0 to switch it off")
        self.frequency_penalty = _float(self, "frequency_penalty", -2.0, 2.0, "use 0 to switch it off")
        self.repetition_penalty = _float(
            self, "repetition_penalty", 0.0, sys.float_info.max, "use 1 to switch it off", low_open=True
        )
        self.logit_bias = _biases(self.logit_bias)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise _error("allowed_token_ids", [], "leaves no token to draw; use None to allow all")
        self.bad_words = _strings("bad_words", self.bad_words) or None
        if self.bad_words and len(self.bad_words) > MAX_BAD_WORDS:
            what = f"are {len(self.bad_words)} texts; at most {MAX_BAD_WORDS} are allowed"
            raise _error("bad_words", f"{self.bad_words[:3]}...", what)

    def _check_logprobs(self) -> None:
        if self.logprobs is not None:
            hint = "use 0 for the sampled tokens alone, -1 for the whole vocabulary, None for none"
            self.logprobs = _int(self, "logprobs", -1, None, hint)
        if self.prompt_logprobs is not None:
            hint = "use 0 for the prompt's tokens alone, -1 for the whole vocabulary, None for none"
            self.prompt_logprobs = _int(self, "prompt_logprobs", -1, None, hint)
        if self.logprob_token_ids is not None:
            ids = self.logprob_token_ids = _token_ids("logprob_token_ids", self.logprob_token_ids) or None
            if ids and len(ids) > MAX_LOGPROB_TOKEN_IDS:
                what = f"are {len(ids)} ids; at most {MAX_LOGPROB_TOKEN_IDS} are allowed; logprobs=-1 gives all"
                raise _error("logprob_token_ids", f"{ids[:3]}...", what)

    def _check_lengths(self) -> None:
        if self.max_tokens is not None:
            hint = "use None (null in YAML) for as many tokens as fit in the model's context"
            self.max_tokens = _int(self, "max_tokens", 1, None, hint)
        self.min_tokens = _int(self, "min_tokens", 0, None, "use 0 for no lower limit")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            allowed = f"must be at most max_tokens={self.max_tokens}; lower min_tokens or raise max_tokens"
            raise _error("min_tokens", self.min_tokens, allowed)

    def _check_text_options(self) -> None:
        for name in _BOOLEANS:
            if not isinstance(getattr(self, name), bool):
                raise _error(name, getattr(self, name), "must be True or False")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise _error(
                "output_kind", self.output_kind, "must be a RequestOutputKind, such as RequestOutputKind.DELTA"
            )
        self.stop = _strings("stop", self.stop)
        if self.stop and not self.detokenize:
            allowed = "needs detokenize=True, since stop strings are found in the text; use stop_token_ids instead"
            raise _error("stop", self.stop, allowed)
        self.stop_token_ids = _token_ids("stop_token_ids", self.stop_token_ids)

    def _check_host_options(self) -> None:
        if self.stream_interval is not None:
            self.stream_interval = _int(self, "stream_interval", 1, None, "use None or 1 for an output per token")
        if not isinstance(self.skip_reading_prefix_cache, (bool, NoneType)):
            raise _error("skip_reading_prefix_cache", self.skip_reading_prefix_cache, "must be True, False or None")
        self.repetition_detection = _repetition_detection(self.repetition_detection)
        if self.thinking_token_budget is not None:
            hint = "use None for as many tokens of reasoning as max_tokens allows"
            self.thinking_token_budget = _int(self, "thinking_token_budget", 0, MAX_THINKING_TOKEN_BUDGET, hint)
        if not isinstance(self.extra_args, (Mapping, NoneType)):
            raise _error("extra_args", self.extra_args, "must be a dict")
        self.extra_args = dict(self.extra_args) if self.extra_args else None
        if self.structured_outputs is not None:
            self.structured_outputs = StructuredOutputsParams.from_value(self.structured_outputs)

    def _make_greedy(self) -> None:
        if self.n > 1:
            allowed = f"must be 1 with temperature={self.temperature}, where all completions would be the same; "
            raise _error("n", self.n, allowed + "set n=1 or a temperature above 0")
        self.top_p, self.top_k, self.min_p = 1.0, 0, 0.0


@dataclass(slots=True)
class BeamSearchParams:
    """Rules of one beam search; see `vjax.beam_search.BeamSearch`.

    Raises:
        VjaxValidationError: A value is out of its domain, or belongs to a feature that does not work yet.
    """

    #: Sequences that are followed, and returned; twice as many may be at most the engine's max_logprobs.
    beam_width: int
    #: At least 1. A sequence ends at the model's context as well.
    max_tokens: int
    #: Go on after an end-of-sequence token.
    ignore_eos: bool = False
    #: 0 to 2, as in `SamplingParams`. The search draws nothing: only logprobs_mode="processed_logprobs" depends on it.
    temperature: float = 0.0
    #: Above 0 favours long sequences: scores are sums of log probabilities over length ** length_penalty.
    length_penalty: float = 1.0
    #: Whether `text` has the end-of-sequence token's.
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    structured_outputs: Any = None
    watermarking: Any = None
    allowed_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        self.beam_width = _int(self, "beam_width", 1, None, "4 is common")
        self.max_tokens = _int(self, "max_tokens", 1, None, "ask for at least one token")
        self.temperature = _float(self, "temperature", 0.0, MAX_TEMPERATURE, "0 is usual: beam search draws nothing")
        self.length_penalty = _float(
            self, "length_penalty", -_MAX_LENGTH_PENALTY, _MAX_LENGTH_PENALTY, "use 0 to compare sums, 1 for means"
        )
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _error(name, getattr(self, name), "must be True or False")
        for name in ("structured_outputs", "watermarking", "allowed_token_ids"):
            if getattr(self, name) is not None:
                raise _error(name, getattr(self, name), "is not supported by beam search; leave it out")


#: Lengths to this power are finite numbers.
_MAX_LENGTH_PENALTY = 32.0

_BOOLEANS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "flat_logprobs",
)

_SUPPORTED = {"n", "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "min_tokens"}
_SUPPORTED |= {"stop", "stop_token_ids", "output_kind", *_BOOLEANS}
_SUPPORTED |= {"presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids"}
_SUPPORTED |= {"bad_words", "logprobs", "prompt_logprobs", "logprob_token_ids"}
_SUPPORTED |= {"stream_interval", "skip_reading_prefix_cache", "repetition_detection"}
_SUPPORTED |= {"thinking_token_budget", "extra_args", "structured_outputs"}
_UNSUPPORTED = {f.name: f.default for f in dataclasses.fields(SamplingParams) if f.name not in _SUPPORTED}
#: Defaults as they are after construction.
_REPR_DEFAULTS = [
    (f.name, [] if f.name in ("stop", "stop_token_ids") else f.default) for f in dataclasses.fields(SamplingParams)
]


def _error(name: str, value: object, what: str) -> VjaxValidationError:
    return VjaxValidationError(f"{name}={value!r} {what}.", parameter=name, value=value)


def _range(low: float | None, high: float | None, low_open: bool = False) -> str:
    if high is None:
        return f"at least {low}"
    return f"in {'(' if low_open else '['}{low}, {high}]"


def _int(params: Any, name: str, low: int, high: int | None, hint: str) -> int:
    value = getattr(params, name)
    number = None if isinstance(value, bool) else _as_index(value)
    if number is None or number < low or (high is not None and number > high):
        raise _error(name, value, f"must be an integer {_range(low, high)}; {hint}")
    return number


def _as_index(value: Any) -> int | None:
    try:
        return value.__index__()
    except (AttributeError, TypeError):
        return None


def _float(params: Any, name: str, low: float, high: float, hint: str, low_open: bool = False) -> float:
    value = getattr(params, name)
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    inside = low < number <= high if low_open else low <= number <= high
    if not inside:
        raise _error(name, value, f"must be a number {_range(low, high, low_open)}; {hint}")
    return number


def _strings(name: str, value: Any) -> list[str]:
    strings = [value] if isinstance(value, str) else value
    if strings is None:
        return []
    if not isinstance(strings, (list, tuple)) or not all(isinstance(s, str) for s in strings):
        raise _error(name, value, "must be a string or a list of strings")
    if "" in strings:
        raise _error(name, value, "contains an empty string, which would match everywhere; remove it")
    return list(strings)


def _biases(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _error("logit_bias", value, "must map token ids to numbers")
    biases: dict[int, float] = {}
    for token_id, bias in value.items():
        try:  # JSON has strings for keys
            number, amount = int(token_id), float(bias)
        except (TypeError, ValueError, OverflowError):
            number, amount = -1, math.nan
        if number < 0 or math.isnan(amount) or isinstance(token_id, (bool, float)):
            raise _error(
                "logit_bias", value, f"must map token ids to numbers; {token_id!r}: {bias!r} is not such a pair"
            )
        biases[number] = min(max(amount, -MAX_LOGIT_BIAS), MAX_LOGIT_BIAS)
    if len(biases) > MAX_LOGIT_BIASES:
        what = f"has {len(biases)} ids; at most {MAX_LOGIT_BIASES} are allowed; allowed_token_ids takes any number"
        raise _error("logit_bias", "{...}", what)
    return biases or None


def _token_ids(name: str, value: Any) -> list[int]:
    if value is None:
        return []
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise _error(name, value, "must be a list of token ids")
    ids = []
    for item in value:
        number = None if isinstance(item, bool) else _as_index(item)
        if number is None or number < 0:
            raise _error(name, value, f"must be a list of token ids (integers at least 0); {item!r} is not one")
        ids.append(number)
    return list(dict.fromkeys(ids))


def _repetition_detection(value: Any) -> RepetitionDetectionParams | None:
    if value is None or isinstance(value, RepetitionDetectionParams):
        return value
    names = [field.name for field in dataclasses.fields(RepetitionDetectionParams)]
    if not isinstance(value, Mapping) or not set(value) <= set(names):
        allowed = f"must be a RepetitionDetectionParams, or a mapping with {', '.join(names)}"
        raise _error("repetition_detection", value, allowed)
    return RepetitionDetectionParams(**value)
