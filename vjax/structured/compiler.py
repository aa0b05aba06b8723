"""Grammars ready to be followed: compiled once for the model's tokens, copied for each request."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from vjax.errors import VjaxValidationError
from vjax.messages import mask_width
from vjax.structured.matcher import GrammarMatcher
from vjax.structured.reasoning import ReasoningTags
from vjax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

#: Compiled grammars that are kept, those used last; one takes 0.04 MiB, and 0.2 with the states that it went through.
_MAX_KEPT = 256
#: Times that a grammar takes over the states that a request went through: llguidance limits their number, and most of
#: what can be gained is by then.
_MAX_TAKEN_BACK = 16


@dataclass
class _Kept:
    """A compiled grammar, at the beginning of a text; later the one of a request that has ended, for its states."""

    matcher: LLMatcher
    num_taken_back: int = 0


class GrammarCompiler:
    """Makes matchers from grammars of `grammar_text`. Safe to use from several threads.

    Args:
        load: The model's tokenizer; called when the first grammar comes.
        vocab_size: Of the model.
        eos_token_ids: Given the tokenizer, the tokens that end a text; any of them may be drawn where the grammar may
            end, and nowhere else.
        tags: Those of a model whose reasoning grammars leave free.
    """

    def __init__(
        self,
        load: Callable[[], Tokenizer | None],
        *,
        vocab_size: int,
        eos_token_ids: Callable[[Tokenizer], Sequence[int]],
        tags: ReasoningTags | None = None,
    ):
        self._load = load
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._tags = tags
        self._loading = threading.Lock()
        self._tokens: LLTokenizer | None = None
        #: Guards what follows, and is never held for long: a grammar may take a second to compile.
        self._lock = threading.Lock()
        #: Those that are being compiled among them, so that each is compiled once for all who wait.
        self._compiled: OrderedDict[str, Future[_Kept]] = OrderedDict()

    def matcher(self, grammar: str) -> GrammarMatcher:
        """At the beginning of a text. Compiles the grammar, or waits for another thread that does.

        Raises:
            VjaxValidationError: llguidance refuses the grammar, or the engine has no tokenizer that it can use.
        """
        with self._lock:
            future = self._compiled.get(grammar)
            is_mine = future is None
            if future is None:
                future = self._compiled[grammar] = Future()
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > _MAX_KEPT:
                self._compiled.popitem(last=False)
        if is_mine:
            try:
                future.set_result(_Kept(self._compile(grammar)))
            except BaseException as e:
                with self._lock:
                    if self._compiled.get(grammar) is future:
                        del self._compiled[grammar]
                future.set_exception(e)
                raise
        return self._copy(future)

    def ready(self, grammar: str) -> GrammarMatcher | None:
        """As `matcher`, at once; None where the grammar is not compiled."""
        with self._lock:
            future = self._compiled.get(grammar)
            if future is None or not future.done() or future.exception() is not None:
                return None
            self._compiled.move_to_end(grammar)
        return self._copy(future)

    def _copy(self, future: Future[_Kept]) -> GrammarMatcher:
        kept = future.result()
        with self._lock:
            return GrammarMatcher(kept.matcher.deep_copy(), self._tags, partial(self._take_back, kept))

    def _take_back(self, kept: _Kept, matcher: LLMatcher) -> None:
        """Later requests begin with the states of the lexer that this one has computed: the slowest of the masks of 64
        rows, each with a schema of its own, then takes 0.07 instead of 0.6 ms in the median."""
        if matcher.is_error() or kept.num_taken_back == _MAX_TAKEN_BACK or not matcher.reset():
            return
        with self._lock:
            kept.matcher = matcher
            kept.num_taken_back += 1

    def _compile(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher

        with self._loading:
            if self._tokens is None:
                self._tokens = self._load_tokens()
        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise _error(matcher.get_error())
        return matcher

    def _load_tokens(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        tokenizer = self._load()
        if tokenizer is None:
            raise _error("it needs a tokenizer, and the engine was created with skip_tokenizer_init=True")
        if not tokenizer.is_fast:
            raise _error("it needs a tokenizer with tokenizer.json, and the model's is one that transformers runs")
        eos = list(self._eos_token_ids(tokenizer))
        if not eos:
            raise _error("it needs an EOS token, by which a completion ends, and the model has none")
        size = max(self._vocab_size, len(tokenizer))
        if mask_width(size) != mask_width(self._vocab_size):
            raise _error(f"the tokenizer has {size} tokens, and the model {self._vocab_size}")
        try:
            return LLTokenizer(tokenizer.backend.to_str(), n_vocab=size, eos_token=eos)
        except ValueError as e:
            raise _error(f"llguidance cannot use the model's tokenizer: {e}") from e


def _error(what: str) -> VjaxValidationError:
    return VjaxValidationError(what, parameter="structured_outputs")
