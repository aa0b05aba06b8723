"""Users' logits processors and thinking_token_budget, through the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vjax import LLM, AsyncEngineArgs, AsyncLLM, ConfigError, LogitsProcessor, SamplingParams, VjaxValidationError
from vjax.sample.processors import History, end_thinking

pytestmark = pytest.mark.usefixtures("shared_programs")

TEXTS = ["def read_lines(path):\n", "class Stack:\n    def push(self", "import os\nimport sys\n", "x = [1, 2, 3"]
#: The texts around "reasoning": the model writes neither of them where it is told to here.
TAGS = {"reasoning_start_str": "import", "reasoning_end_str": "):\n"}
PLENTY, FEW = 200, 10


class Only(LogitsProcessor):
    """Leaves the tokens of one parity: extra_args={"parity": 0 or 1}."""

    num_values = 1

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        parity = (params.extra_args or {}).get("parity")
        if parity not in (None, 0, 1):
            raise ValueError(f"parity={parity!r} must be 0 or 1")

    def values(self, params: SamplingParams) -> Sequence[float] | None:
        parity = (params.extra_args or {}).get("parity")
        return None if parity is None else [parity]

    def apply(self, logits: jax.Array, values: jax.Array, history: History) -> jax.Array:
        ids = jnp.arange(logits.shape[1])
        return jnp.where(ids % 2 == values[:, :1].astype(jnp.int32), logits, -jnp.inf)


class NoRepeats(LogitsProcessor):
    """Takes the latest token away, as far as the output goes: extra_args={"no_repeats": True}."""

    def values(self, params: SamplingParams) -> Sequence[float] | None:
        return [] if (params.extra_args or {}).get("no_repeats") else None

    def apply(self, logits: jax.Array, values: jax.Array, history: History) -> jax.Array:
        last = jnp.take_along_axis(history.token_ids, history.num_tokens[:, None] - 1, axis=1)
        started = (history.num_tokens > history.num_prompt_tokens)[:, None]
        return jnp.where(started & (jnp.arange(logits.shape[1]) == last), -jnp.inf, logits)


class Shapeless(LogitsProcessor):
    def apply(self, logits: jax.Array, values: jax.Array, history: History) -> jax.Array:
        return logits.sum()


class Untraceable(LogitsProcessor):
    def apply(self, logits: jax.Array, values: jax.Array, history: History) -> jax.Array:
        return logits if logits[0, 0] > 0 else -logits


def make_llm(blocks: int = PLENTY, **options) -> LLM:
    processors = [Only, f"{__name__}:NoRepeats"]
    limits = {"max_model_len": 128, "max_num_seqs": 8, "num_gpu_blocks_override": blocks}
    return LLM(dtype="float32", logits_processors=processors, reasoning_config=TAGS, **limits, **options)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with make_llm() as llm:
        yield llm


def greedy(**options) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, **options})


def generate(llm: LLM, params, texts=TEXTS) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(texts, params, use_tqdm=False)]


def test_processors_of_users(llm: LLM):
    plain = generate(llm, greedy())
    for parity in (0, 1):
        for ids in generate(llm, greedy(extra_args={"parity": parity})):
            assert {i % 2 for i in ids} == {parity}
    # Each request for itself, in one batch and after one another in the same rows.
    kinds = [greedy(extra_args={"parity": 1}), greedy(), greedy(extra_args={"no_repeats": True, "parity": 0}), greedy()]
    mixed = generate(llm, kinds)
    assert mixed[1] == plain[1] and mixed[3] == plain[3] and generate(llm, greedy()) == plain
    assert all(i % 2 for i in mixed[0]) and not any(i % 2 for i in mixed[2])
    assert all(a != b for a, b in zip(mixed[2], mixed[2][1:], strict=False))
    # After the built-in ones: the bias leaves one token, which the processor takes away every second time.
    biased = greedy(logit_bias={300: 100.0, 302: 90.0}, extra_args={"no_repeats": True})
    assert generate(llm, biased, TEXTS[:1]) == [[300, 302] * 8]


def test_bad_processors_and_arguments(llm: LLM):
    for processor, text in (
        (Shapeless, r"Shapeless.apply gave .* for logits of shape \(2, 4096\)"),
        (Untraceable, "Untraceable.apply cannot be traced by JAX: TracerBoolConversionError"),
        ("no.module:Name", "'no.module:Name', which cannot be imported"),
        (int, "which is no subclass of vjax.LogitsProcessor"),
    ):
        with pytest.raises(ConfigError, match=text):
            LLM(logits_processors=[processor], num_gpu_blocks_override=4, max_model_len=32)
    with pytest.raises(ConfigError, match="must be a list of subclasses"):
        LLM(logits_processors=Only)
    with pytest.raises(ConfigError, match="must have no keys but reasoning_start_str and reasoning_end_str"):
        LLM(reasoning_config={"start": "a"})
    with pytest.raises(VjaxValidationError, match=r"Only refuses extra_args=\{'parity': 2\}: parity=2 must be 0 or 1"):
        generate(llm, greedy(extra_args={"parity": 2}))
    with pytest.raises(VjaxValidationError, match="thinking_token_budget=-1 must be an integer"):
        greedy(thinking_token_budget=-1)
    assert llm.llm_engine.get_num_unfinished_requests() == 0

    class Local(LogitsProcessor):
        pass

    with pytest.raises(ConfigError, match=r"Local is defined in the main program or in a function.*multiprocess=False"):
        AsyncLLM.from_engine_args(AsyncEngineArgs(logits_processors=[Local]))


def test_engine_without_them():
    with LLM(num_gpu_blocks_override=8, max_model_len=32) as llm:
        with pytest.raises(VjaxValidationError, match="are for logits processors, and the engine has none"):
            generate(llm, greedy(extra_args={"a": 1}))
        with pytest.raises(VjaxValidationError, match=r"thinking_token_budget=3 needs .* reasoning_config=\{\}"):
            generate(llm, greedy(thinking_token_budget=3))
        assert llm.llm_engine._core.runner.step.processor_specs().custom is None


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[list[int]]:
    return generate_kinds(llm)


def kinds() -> list[SamplingParams]:
    seeded = {"temperature": 0.8, "seed": 3}
    return [
        greedy(thinking_token_budget=0, extra_args={"parity": 1}),
        greedy(thinking_token_budget=5, extra_args={"no_repeats": True}, **seeded),
        greedy(thinking_token_budget=9, min_tokens=16),
        greedy(extra_args={"no_repeats": True, "parity": 0}, **seeded),
    ]


def generate_kinds(llm: LLM) -> list[list[int]]:
    start = llm.get_tokenizer().encode(TAGS["reasoning_start_str"])
    prompts = [[*llm.get_tokenizer().encode("x = 1\n" * 8 + text), *start] for text in TEXTS]
    return generate(llm, kinds(), prompts)


def test_thinking_ends_with_its_budget(llm: LLM, expected: list[list[int]]):
    end = llm.get_tokenizer().encode(TAGS["reasoning_end_str"])
    assert len(end) > 1, "its tokens are forced one after the other"
    where = [next(i for i in range(17) if ids[i : i + len(end)] == end or i == 16) for ids in expected]
    # The third one's prompt has thought six tokens of its nine.
    assert where == [0, 5, 3, 16]
    assert expected[0][: len(end)] == end and any(i % 2 == 0 for i in end), "what is forced is not processed"
    others = [TEXTS[0], TEXTS[1], TEXTS[3]]
    plain = generate(llm, greedy(), others)
    assert generate(llm, greedy(thinking_token_budget=1), others) == plain, "who does not think has no budget"


@pytest.mark.parametrize(("overlap", "blocks", "budget"), [(False, PLENTY, 16), (True, FEW, 64)])
def test_modes_agree(expected: list[list[int]], overlap: bool, blocks: int, budget: int):
    options = {"async_scheduling": overlap, "max_num_batched_tokens": budget, "disable_log_stats": False}
    with make_llm(blocks, **options) as llm:
        assert generate_kinds(llm) == expected
        preemptions = next(m.value for m in llm.get_metrics() if m.name == "vjax:num_preemptions")
    assert (preemptions > 0) == (blocks == FEW)


SEQUENCES = st.lists(st.integers(0, 3), min_size=1, max_size=3)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(SEQUENCES, SEQUENCES, st.lists(st.integers(0, 3), min_size=1, max_size=14), st.data())
def test_end_thinking(start: list[int], end: list[int], tokens: list[int], data: st.DataObject):
    """Against a loop over the sequence."""
    num_prompt, budget = data.draw(st.integers(1, len(tokens))), data.draw(st.integers(-1, 5))

    def ends(sequence: list[int], first: int = 0) -> list[int]:
        n = len(sequence)
        return [i + n for i in range(first, len(tokens) - n + 1) if tokens[i : i + n] == sequence]

    opened = ends(start, max(ends(end), default=0))
    step = len(tokens) - max(opened[0] + budget, num_prompt) if opened else -1
    forced = budget >= 0 and step >= 0
    logits = np.arange(8, dtype=np.float32)[None]
    padded = np.array([[*tokens, *[9] * (16 - len(tokens))]], np.int32)
    counts = jnp.asarray([[len(tokens)], [num_prompt]], jnp.int32)
    history = History(jnp.asarray(padded), *counts)
    got, rows = end_thinking(
        jnp.asarray(logits), history, jnp.asarray([budget], jnp.int32), start=tuple(start), end=tuple(end)
    )
    assert bool(rows[0]) == forced
    wanted = logits if not forced else np.where(np.arange(8) == end[min(step, len(end) - 1)], 0, -np.inf)[None]
    np.testing.assert_array_equal(got, wanted)
