"""`LLM`: offline inference with the names and semantics of vLLM's class."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from vjax.beam_search import BeamSearch, BeamSearchOutput, check_beam_search
from vjax.config.engine_args import EngineArgs
from vjax.engine.batch_args import (
    Prompt,
    check_other_arguments,
    params_per_prompt,
    priority_per_prompt,
    prompt_list,
    salt_per_prompt,
)
from vjax.engine.front import BaseLLMEngine
from vjax.errors import VjaxValidationError
from vjax.llm_pooling import PoolingMethods
from vjax.metrics import Metric
from vjax.outputs import RequestOutput
from vjax.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from vjax.text.chat import chat_prompt
from vjax.text.tokenizer import Tokenizer


class LLM(PoolingMethods):
    """A model ready to generate, or to pool.

    Args:
        model: A folder in Hugging Face format, a hub id, or "vjax-tiny", the bundled model.
        tokenizer: Folder or hub id of the tokenizer when it is not the model's.
        **kwargs: Engine arguments under vLLM's names; see `vjax.config.engine_args.EngineArgs`.

    Raises:
        ConfigError, ModelLoadError, OutOfMemoryError: All ValueErrors that say what was got and what to do.

    Use it as a context manager, or call `shutdown`, or drop the last reference, to free the device arrays; the memory
    pool itself goes back to the driver when the process ends.
    """

    #: The mode of the class; None leaves it to `use_v1=` and the environment.
    _mode: bool | None = None

    def __init__(self, model: str = "vjax-tiny", *, tokenizer: str | None = None, **kwargs: Any):
        args = EngineArgs.from_kwargs(model=model, tokenizer=tokenizer, **kwargs)
        if args.use_v1 is None and self._mode is not None:
            args = dataclasses.replace(args, use_v1=self._mode)
        self.llm_engine = BaseLLMEngine(args)
        self._request_ids = itertools.count()

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> LLM:
        """An LLM from an EngineArgs record."""
        return cls(**dataclasses.asdict(args))

    # ---- generation ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> list[RequestOutput]:
        """Completions of `prompts`, in their order.

        Args:
            prompts: One prompt or a list of them.
            sampling_params: One for all prompts or one per prompt; None takes the model's defaults.
            use_tqdm: Show progress on stderr; a callable is used in place of `tqdm.tqdm`.
            priority: One per prompt, lower first, with scheduling_policy="priority".
            tokenization_kwargs: How prompts become token ids: "truncate_prompt_tokens" (at most so many, the last ones;
                -1 is as many as the model takes), "truncation_side" ("left" or "right") and "add_special_tokens".
            others: vLLM's further keywords, such as lora_request: accepted while they ask for nothing.

        Raises:
            VjaxValidationError: A prompt or parameter is invalid. No request of the call stays behind.
            RuntimeError: The LLM was shut down.
        """
        check_other_arguments("generate", others)
        batch = prompt_list(prompts)
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = params_per_prompt(sampling_params, len(batch))
        ids = self._add_all(batch, params, priority_per_prompt(priority, len(batch)), tokenization_kwargs)
        return self._run(ids, use_tqdm)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: Sequence[int] | None = None,
        cache_salt: str | Sequence[str | None] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> list[RequestOutput]:
        """Answers to one conversation or a list of them.

        What a model thinks and the calls that it writes are in the text of its answer; `vjax.reasoning_parser` and
        `vjax.tool_parser` find them there.

        Args:
            messages: [{"role": ..., "content": ...}, ...], or a list of such lists. Content is a text or a list of
                {"type": "text", "text": ...}. An assistant's message may have tool_calls, whose arguments are a dict or
                JSON text, and reasoning; one of role "tool" is the result of a call.
            chat_template: Jinja template instead of the tokenizer's, or the name of one of the tokenizer's.
            chat_template_content_format: Whether the template takes content as a "string" or as a list of parts
                ("openai"); "auto" looks at the template.
            add_generation_prompt: Begin an answer. continue_final_message: Go on with the last message instead; it
                needs add_generation_prompt=False.
            tools: What the model may call: {"type": "function", "function": {"name": ..., "parameters": {...}}}.
            chat_template_kwargs: Further variables of the template, such as enable_thinking.
            priority, cache_salt: One per conversation, as `generate` has them; one cache_salt may serve all.
            tokenization_kwargs: As `generate`; special tokens are the template's own.
            The rest: as `generate`.

        Raises:
            VjaxValidationError: As `generate`; a conversation is malformed (the text names the message's index), or the
                tokenizer has no chat template.
        """
        check_other_arguments("chat", others)
        if not isinstance(chat_template_kwargs, (Mapping, type(None))):
            raise VjaxValidationError(
                f"chat_template_kwargs={chat_template_kwargs!r:.100} must be a dict of the template's variables.",
                parameter="chat_template_kwargs",
                value=chat_template_kwargs,
            )
        options = {
            "chat_template": chat_template,
            "chat_template_content_format": chat_template_content_format,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            **(chat_template_kwargs or {}),
        }
        is_many = isinstance(messages, (list, tuple)) and messages and isinstance(messages[0], (list, tuple))
        prompts = self._chat_prompts(messages if is_many else [messages], options)
        for prompt, salt in zip(prompts, salt_per_prompt(cache_salt, len(prompts)), strict=True):
            prompt["cache_salt"] = salt
        return self.generate(
            prompts, sampling_params, use_tqdm=use_tqdm, priority=priority, tokenization_kwargs=tokenization_kwargs
        )

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool | Callable[..., Any] = False,
        concurrency_limit: int | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> list[BeamSearchOutput]:
        """The most probable continuations of `prompts`, in their order; see `vjax.beam_search.BeamSearch`.

        Each step of the search is one batch of the beams of all prompts, a token each. With the prefix cache (V1's
        default) a beam computes what is in no full block yet; without it, all of its tokens.

        Args:
            concurrency_limit: Prompts that are searched for at the same time; None: all.
            use_tqdm, tokenization_kwargs: As `generate`.

        Raises:
            VjaxValidationError: A prompt is invalid, or the engine's logprobs_mode or max_logprobs do not permit it.
            RuntimeError: The LLM was shut down.
        """
        check_other_arguments("beam_search", others)
        check_beam_search(params, self.llm_engine.config.model)
        batch = prompt_list(prompts)
        limit = len(batch) if concurrency_limit is None else concurrency_limit
        if batch and (not isinstance(limit, int) or limit < 1):
            raise VjaxValidationError(
                f"concurrency_limit={limit!r} must be at least 1; None searches for all prompts at the same time.",
                parameter="concurrency_limit",
                value=limit,
            )
        tokenized: list[tuple[list[int], str | None]] = []
        for prompt in batch:
            try:
                tokenized.append(self.llm_engine.tokenize(prompt, tokenization_kwargs))
            except VjaxValidationError as e:
                raise _of_prompt(e, len(tokenized), len(batch)) from e
        make_progress = use_tqdm if callable(use_tqdm) else tqdm
        progress = make_progress(total=len(batch), desc="Searched prompts", unit="prompt", disable=not use_tqdm)
        outputs: list[BeamSearchOutput] = []
        try:
            for start in range(0, len(batch), max(limit, 1)):
                outputs += self._search(tokenized[start : start + limit], params, progress)
        finally:
            progress.close()
        return outputs

    def _search(
        self, prompts: Sequence[tuple[list[int], str | None]], params: BeamSearchParams, progress: Any
    ) -> list[BeamSearchOutput]:
        """Of prompts as (token ids, cache salt)."""
        engine = self.llm_engine
        max_model_len = engine.config.model.max_model_len
        searches = [BeamSearch(ids, params, engine.eos_token_id, max_model_len) for ids, _ in prompts]
        while running := [(s, salt) for s, (_, salt) in zip(searches, prompts, strict=True) if s.beams]:
            beams = [
                {"prompt_token_ids": beam.tokens, "cache_salt": salt}
                for search, salt in running
                for beam in search.beams
            ]
            asked = [search.request_params for search, _ in running for _ in search.beams]
            ids = self._add_all(beams, asked, [0] * len(beams), None)
            results = iter(self._run(ids, use_tqdm=False))
            for search, _ in running:
                search.take([next(results).outputs[0] for _ in search.beams])
                progress.update(not search.beams)
        decode = None if engine.tokenizer is None else engine.tokenizer.decode
        return [search.output(decode) for search in searches]

    def _chat_prompts(self, conversations: Sequence[Any], options: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A prompt per conversation."""
        tokenizer = self.get_tokenizer()
        prompts: list[dict[str, Any]] = []
        for conversation in conversations:
            try:
                prompts.append(chat_prompt(tokenizer, conversation, **options))
            except VjaxValidationError as e:
                if len(conversations) == 1:
                    raise
                text = f"conversations[{len(prompts)}]: {e}"
                raise VjaxValidationError(text, parameter=e.parameter, value=e.value) from e
        return prompts

    def _add_all(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[Any],
        priority: Sequence[int],
        tokenization_kwargs: Mapping[str, Any] | None,
    ) -> list[str]:
        """Adds every prompt, or none."""
        ids: list[str] = []
        arrival = time.monotonic()
        try:
            for prompt, p, rank in zip(prompts, params, priority, strict=True):
                if isinstance(p, SamplingParams) and p.output_kind is not RequestOutputKind.FINAL_ONLY:
                    p = p.clone()
                    p.output_kind = RequestOutputKind.FINAL_ONLY
                request_id = next(i for i in map(str, self._request_ids) if not self.llm_engine.has_request(i))
                self.llm_engine.add_request(
                    request_id, prompt, p, arrival, priority=rank, tokenization_kwargs=tokenization_kwargs
                )
                ids.append(request_id)
        except BaseException as e:
            self.llm_engine.abort_request(ids)
            if isinstance(e, VjaxValidationError):
                raise _of_prompt(e, len(ids), len(prompts)) from e
            raise
        return ids

    def _run(self, ids: list[str], use_tqdm: bool | Callable[..., Any]) -> list[Any]:
        """Steps until every request of the call is finished."""
        finished: dict[str, Any] = {}
        wanted = set(ids)
        others: list[Any] = []  # of requests that were added to the engine directly
        make_progress = use_tqdm if callable(use_tqdm) else tqdm
        progress = make_progress(total=len(ids), desc="Processed prompts", unit="prompt", disable=not use_tqdm)
        start, num_in, num_out = time.monotonic(), 0, 0
        try:
            while len(finished) < len(wanted):
                for output in self.llm_engine.step():
                    if output.request_id not in wanted:
                        others.append(output)
                        continue
                    finished[output.request_id] = output
                    num_in += len(output.prompt_token_ids or ())
                    if isinstance(output, RequestOutput):
                        num_out += sum(len(c.token_ids) for c in output.outputs)
                    if not progress.disable:
                        seconds = max(time.monotonic() - start, 1e-9)
                        progress.set_postfix_str(f"in {num_in / seconds:.0f} tok/s, out {num_out / seconds:.0f} tok/s")
                        progress.update()
        except BaseException:
            self.llm_engine.abort_request([i for i in ids if i not in finished])
            raise
        finally:
            self.llm_engine.put_back(others)
            progress.close()
        return [finished[i] for i in ids]

    # ---- the rest -----------------------------------------------------------------------------------------------

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.llm_engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when it gets no sampling parameters: generation_config.json over vLLM's defaults."""
        return self.llm_engine.get_default_sampling_params()

    def get_metrics(self) -> list[Metric]:
        """vLLM's counters, gauges and histograms, as "vjax:..."; needs disable_log_stats=False."""
        return self.llm_engine.get_metrics()

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forgets every cached prefix; False while a request holds blocks.

        Args:
            reset_running_requests: Running requests give their blocks back first, and are computed again.
        """
        return self.llm_engine.reset_prefix_cache(reset_running_requests)

    # ---- control ------------------------------------------------------------------------------------------------

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Stops the engine and gives its device memory back to this process's pool, until `wake_up`.

        Requests that are added meanwhile wait. `generate` does not wait with them: it raises an EngineAsleepError, a
        RuntimeError. May be called again to sleep more deeply.

        Args:
            level: 0 stops scheduling and keeps the memory. 1 frees the KV cache and moves the weights to the host. 2
                drops the weights as well.
            mode: Unfinished requests end with finish_reason "abort" ("abort"); those that run are finished first, and
                the others wait ("wait"); or all wait ("keep"), and those that ran are computed again.

        Raises:
            VjaxValidationError: There is no such level or mode.
        """
        self.llm_engine.sleep(level, mode)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Ends the sleep: outputs are those that the engine would have given, and the prefix cache is empty.

        Weights that level 2 dropped are loaded from the checkpoint, unless `update_weights` has brought others. (vLLM
        leaves them undefined until somebody loads some.)

        Args:
            tags: Of "weights", "kv_cache" and "scheduling", to wake up one after the other; None is everything.
                Requests run as soon as nothing sleeps any more.

        Raises:
            VjaxValidationError: There is no such tag; or, as OutOfMemoryError, something else took the memory.
            EngineAsleepError: "scheduling" alone was to go on, without weights or KV cache.
        """
        self.llm_engine.wake_up(tags)

    def is_sleeping(self) -> bool:
        """Asleep at any level, in part as well."""
        return self.llm_engine.is_sleeping()

    def update_weights(self, params: Mapping[str, Any] | Sequence[Any], *, partial: bool = False) -> None:
        """Puts new weights in the place of the old ones; nothing is compiled, and the prefix cache is forgotten.

        Leaves are exchanged one at a time, so that a device has to hold one leaf twice at most. If that fails half-way,
        all weights are dropped and the engine sleeps.

        Args:
            params: Names -> numpy, jax or torch arrays of any float dtype, which stay the caller's. Names are those of
                `get_weights`, or of the tensors of the Hugging Face checkpoint, or both. Or all leaves as a tuple, in
                the order of `get_weights`.
            partial: Leaves that are not named stay as they are; otherwise all must be named.

        Raises:
            VjaxValidationError: Lists all that is missing, unknown, mis-shaped or no float. Nothing has changed.
            RuntimeError: Requests are unfinished and the engine does not sleep; with sleep(level=0, mode="keep") they
                wait, and go on with the new weights, which compute their KV anew.
            EngineAsleepError: The update is partial, and the other weights sleep.
        """
        self.llm_engine.update_weights(params, partial=partial)

    def get_weights(self, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The weights by the names of the engine's leaves, in its order and dtypes, as copies on the host.

        Args:
            names: Of the leaves that are wanted; None is all.

        Raises:
            VjaxValidationError: There is no such leaf.
            EngineAsleepError: The weights were dropped by sleep(level=2).
        """
        return self.llm_engine.get_weights(names)

    def collective_rpc(
        self, method: str | Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Calls the engine's one `ModelRunner` between two steps; returns a list of one result.

        Args:
            method: Name of a public method of the runner, such as "reload_weights", or a function that gets the runner
                and then args and kwargs. For an engine in another process it has to be importable, and the result to be
                picklable.

        Raises:
            VjaxValidationError: There is no such method, or the call or its result cannot cross.
            What the method raises.
        """
        return self.llm_engine.collective_rpc(method, args, kwargs)

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        """Calls `func` with the Flax module, whose parameters are the engine's own arrays: to look at, and not to keep.
        Returns a list of one result. See `collective_rpc`."""
        return self.llm_engine.apply_model(func)

    def start_profile(self, profile_prefix: str | None = None) -> None:
        """Begins a trace of `jax.profiler`, in the folder that the engine argument profiler_dir or the variable
        VJAX_PROFILER_DIR names.

        Args:
            profile_prefix: Folder of this trace, inside that one.

        Raises:
            VjaxValidationError: There is no folder.
            RuntimeError: A trace is being recorded already.
        """
        self.llm_engine.start_profile(profile_prefix)

    def stop_profile(self) -> None:
        """Ends the trace and writes it.

        Raises:
            RuntimeError: None is being recorded.
        """
        self.llm_engine.stop_profile()

    def shutdown(self) -> None:
        """Frees the device arrays; nothing can be generated afterwards. May be called more than once."""
        self.llm_engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()


def _of_prompt(error: VjaxValidationError, index: int, num_prompts: int) -> VjaxValidationError:
    """The error, naming the prompt if there are several."""
    text = f"prompts[{index}]: {error}" if num_prompts > 1 else str(error)
    return VjaxValidationError(text, parameter=error.parameter, value=error.value)


class V0LLM(LLM):
    """LLM in V0 mode."""

    _mode = False


class V1LLM(LLM):
    """LLM in V1 mode."""

    _mode = True
