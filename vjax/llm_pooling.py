"""What `LLM` does with a model that pools: `encode`, `embed`, `classify`, `reward` and `score`, as in vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vjax.config.pooler import Pooling
from vjax.engine.batch_args import Prompt, check_other_arguments, params_per_prompt, priority_per_prompt, prompt_list
from vjax.engine.front import BaseLLMEngine
from vjax.engine.pooling import check_task
from vjax.errors import VjaxValidationError
from vjax.outputs import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringRequestOutput,
)
from vjax.pooling_params import PoolingParams

Pooled = PoolingRequestOutput[PoolingOutput]


class PoolingMethods:
    """Part of `LLM`. All methods raise a VjaxValidationError where the engine generates, the model does not do the
    task, or a prompt or parameter is invalid; no request of the call stays behind then."""

    llm_engine: BaseLLMEngine

    def _add_all(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[Any],
        priority: Sequence[int],
        tokenization_kwargs: Mapping[str, Any] | None,
    ) -> list[str]:
        raise NotImplementedError

    def _run(self, ids: list[str], use_tqdm: bool | Callable[..., Any]) -> list[Any]:
        raise NotImplementedError

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        pooling_task: str | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> list[Pooled]:
        """What the model makes of each prompt, as arrays, in the order of the prompts.

        Args:
            prompts: One prompt or a list of them, as `generate` takes them. A prompt may be as long as max_model_len.
            pooling_params: One for all prompts or one per prompt.
            pooling_task: "embed" (f32 [hidden]), "classify" or "score" (f32 [labels]), "token_embed" (f32 [tokens,
                hidden]) or "token_classify" (f32 [tokens, labels]). None: what the model is made for. (vLLM wants it
                named.)
            truncate_prompt_tokens: Keep so many tokens of each prompt, the last ones; -1 is as many as the model takes.
            use_tqdm, priority, tokenization_kwargs: As `generate`.

        A prompt that failed on the device has `error` set and no data; the others are not touched.
        """
        return self._encode(
            "encode",
            prompts,
            pooling_params,
            pooling_task,
            truncate_prompt_tokens=truncate_prompt_tokens,
            use_tqdm=use_tqdm,
            priority=priority,
            tokenization_kwargs=tokenization_kwargs,
            **others,
        )

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        /,
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        **options: Any,
    ) -> list[EmbeddingRequestOutput]:
        """An embedding of each prompt, of length 1 unless the model, pooler_config or `pooling_params` say otherwise.

        Args: Those of `encode`, all but the prompts by name.
        """
        outputs = self._encode("embed", prompts, pooling_params, "embed", **options)
        return [EmbeddingRequestOutput.from_base(output) for output in outputs]

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        /,
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        **options: Any,
    ) -> list[ClassificationRequestOutput]:
        """The probability of each label for each prompt; logits with PoolingParams(use_activation=False).

        Args: Those of `encode`, all but the prompts by name.
        """
        outputs = self._encode("classify", prompts, pooling_params, "classify", **options)
        return [ClassificationRequestOutput.from_base(output) for output in outputs]

    def reward(
        self,
        prompts: Prompt | Sequence[Prompt],
        /,
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        **options: Any,
    ) -> list[Pooled]:
        """What a reward model gives for the tokens of each prompt, f32 [tokens, labels]; with pooling type "STEP" for
        the tokens that end a step.

        Args: Those of `encode`, all but the prompts by name.
        """
        return self._encode("reward", prompts, pooling_params, "token_classify", **options)

    def score(
        self,
        text_1: Prompt | Sequence[Prompt],
        text_2: Prompt | Sequence[Prompt],
        /,
        *,
        pooling_params: PoolingParams | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> list[ScoringRequestOutput]:
        """How well the texts of each pair go together: with an embedding model the cosine of their embeddings; with a
        score head of one label that head's output for both texts in one prompt, as the tokenizer joins a text and its
        `text_pair`.

        Args:
            text_1: One text, which is paired with each of `text_2`, or as many as there.
            text_2: One text or several. For an embedding model prompts of every form will do.
            pooling_params, truncate_prompt_tokens, use_tqdm, tokenization_kwargs: As `encode`.
        """
        check_other_arguments("score", others)
        first, second = prompt_list(text_1), prompt_list(text_2)
        if not second or len(first) not in (1, len(second)):
            raise VjaxValidationError(
                f"score got {len(first)} and {len(second)} texts; pass one text and one or more, or equally many.",
                parameter="text_1",
                value=len(first),
            )
        params = PoolingParams() if pooling_params is None else pooling_params
        pooling = self._pooling(params)
        arguments = {
            "truncate_prompt_tokens": truncate_prompt_tokens,
            "use_tqdm": use_tqdm,
            "tokenization_kwargs": tokenization_kwargs,
        }
        if "score" not in pooling.tasks and "embed" in pooling.tasks:
            outputs = self.encode([*first, *second], params, pooling_task="embed", **arguments)
            left, right = outputs[: len(first)], outputs[len(first) :]
            tokenizer = self.llm_engine.tokenizer
            pad = None if tokenizer is None else tokenizer.pad_token_id
            pairs = zip(left * len(right) if len(left) == 1 else left, right, strict=True)
            return [ScoringRequestOutput.from_base(_cosine(a, b, [] if pad is None else [pad])) for a, b in pairs]
        check_task("score", pooling)
        (params,) = self._pooling_params(params, 1, "score", truncate_prompt_tokens)
        texts = zip(first * len(second) if len(first) == 1 else first, second, strict=True)
        pairs = [
            self.llm_engine.tokenize_pair(_text(a, "text_1"), _text(b, "text_2"), params, tokenization_kwargs)
            for a, b in texts
        ]
        outputs = self.encode([{"prompt_token_ids": ids} for ids in pairs], params, use_tqdm=use_tqdm)
        return [ScoringRequestOutput.from_base(output) for output in outputs]

    def _encode(
        self,
        method: str,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None,
        task: str | None,
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> list[Pooled]:
        """`encode`, as it or the `method` for one task was called."""
        check_other_arguments(method, others)
        batch = prompt_list(prompts)
        params = self._pooling_params(pooling_params, len(batch), task, truncate_prompt_tokens)
        ids = self._add_all(batch, params, priority_per_prompt(priority, len(batch)), tokenization_kwargs)
        return self._run(ids, use_tqdm)

    def _pooling(self, params: Any) -> Pooling:
        return self.llm_engine.check_pooling(params)

    def _pooling_params(
        self, given: Any, num_prompts: int, task: str | None, truncate_prompt_tokens: int | None
    ) -> list[PoolingParams]:
        """One per prompt, with the task and the truncation of the call."""
        pooling = self._pooling(PoolingParams())
        if task is not None:
            check_task(task, pooling)
        if given is None:
            given = PoolingParams()
        each = params_per_prompt(given, num_prompts, PoolingParams, "pooling_params")
        completed: dict[int, PoolingParams] = {}
        for params in each:
            if id(params) not in completed:
                completed[id(params)] = _completed(params, task, truncate_prompt_tokens)
        return [completed[id(params)] for params in each]


def _completed(params: PoolingParams, task: str | None, truncate_prompt_tokens: int | None) -> PoolingParams:
    params = params.clone()
    if task is not None and params.task not in (None, task):
        raise VjaxValidationError(
            f"pooling_params: task={params.task!r} contradicts the call, which is for {task!r}; leave it out.",
            parameter="task",
            value=params.task,
        )
    params.task = task or params.task
    if truncate_prompt_tokens is not None:
        params.truncate_prompt_tokens = truncate_prompt_tokens
        params.__post_init__()
    return params


def _text(prompt: Any, name: str) -> str:
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    if not isinstance(text, str):
        raise VjaxValidationError(
            f"{name}: {prompt!r:.100} is no text; a model that scores pairs gets texts, which it joins.",
            parameter=name,
            value=prompt,
        )
    return text


def _cosine(a: Pooled, b: Pooled, pad: list[int]) -> Pooled:
    """The cosine of two embeddings, as the output of their pair."""
    error = a.error or b.error
    x, y = (output.outputs.data.astype(np.float64) for output in (a, b))
    data = np.zeros(0, np.float32)
    if error is None:
        lengths = np.linalg.norm(x) * np.linalg.norm(y)
        data = np.array([x @ y / max(lengths, 1e-8)], np.float32)
    return PoolingRequestOutput(
        request_id=f"{a.request_id}_{b.request_id}",
        outputs=PoolingOutput(data),
        prompt_token_ids=a.prompt_token_ids + pad + b.prompt_token_ids,
        num_cached_tokens=a.num_cached_tokens + b.num_cached_tokens,
        finished=True,
        error=error,
    )
