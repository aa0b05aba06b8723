"""Embeddings, classes, rewards and scores equal those of transformers in float32, and bad input harms nobody."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from tests.models.pooling_checkpoints import (
    hf_class_logits,
    hf_states,
    make_pooling_checkpoint,
    make_reward_checkpoint,
)
from vjax import LLM, AsyncEngineArgs, AsyncLLM, ConfigError, PoolerConfig, PoolingParams, SamplingParams
from vjax.errors import EngineStepError, VjaxValidationError
from vjax.outputs import EmbeddingRequestOutput, PoolingRequestOutput

pytest.importorskip("torch", reason="Hugging Face in torch is the oracle")

MAX_LEN = 128
#: One forward to compile; the longest prompt is eight chunks.
SMALL: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "max_model_len": MAX_LEN,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "kv_cache_memory_bytes": 8 << 20,
}
_rng = np.random.default_rng(5)
PROMPTS = [_rng.integers(3, 160, n).tolist() for n in (1, 2, 15, 16, 33, 100, MAX_LEN, 7)]
QUIET: dict[str, Any] = {"use_tqdm": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.getbasetemp() / "pooling"


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def close(got, wanted) -> None:
    np.testing.assert_allclose(np.asarray(got), wanted, atol=1e-4, rtol=0)


def as_sentence_transformer(path: str, directory: Path, pooling: dict, *, normalize: bool) -> str:
    """The checkpoint with the files that sentence-transformers adds."""
    target = directory / f"st-{Path(path).name}"
    (target / "1_Pooling").mkdir(parents=True, exist_ok=True)
    for file in Path(path).iterdir():
        if not (target / file.name).exists():
            (target / file.name).symlink_to(file)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * normalize
    modules = [{"idx": i, "path": p, "type": f"sentence_transformers.models.{k}"} for i, (p, k) in enumerate(kinds)]
    (target / "modules.json").write_text(json.dumps(modules))
    (target / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **pooling}))
    return str(target)


# ---- embeddings ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedder(folder):
    """Pools the last token: what a bare decoder is made for."""
    with LLM(make_pooling_checkpoint("llama-bare", folder), **SMALL, disable_log_stats=False) as llm:
        llm.llm_engine.warm_up()
        yield llm
        assert llm.llm_engine.num_compilations_while_serving == 0


@pytest.fixture
def still_works(embedder):
    """The engine is idle and intact after the test."""
    yield
    embedder.llm_engine._core.scheduler.check_integrity()
    assert not embedder.llm_engine.has_unfinished_requests()
    (output,) = embedder.embed(PROMPTS[2], **QUIET)
    close(output.outputs.embedding, unit(hf_states(embedder.llm_engine.config.model.model, PROMPTS[2])[-1]))


def test_last(embedder, folder):
    path = make_pooling_checkpoint("llama-bare", folder)
    for _ in range(2):  # the second time from the prefix cache
        outputs = embedder.embed(PROMPTS, **QUIET)
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            assert isinstance(output, EmbeddingRequestOutput) and output.finished and output.error is None
            assert output.prompt_token_ids == prompt and output.outputs.hidden_size == 64
            close(output.outputs.embedding, unit(hf_states(path, prompt)[-1]))
    assert [o.num_cached_tokens for o in outputs] == [(len(p) - 1) // 16 * 16 for p in PROMPTS]
    raw = embedder.embed(PROMPTS[4], pooling_params=PoolingParams(normalize=False), **QUIET)[0]
    close(raw.outputs.embedding, hf_states(path, PROMPTS[4])[-1])
    assert raw.metrics is not None and raw.metrics.e2e_latency > 0
    counters = {m.name: m.value for m in embedder.get_metrics() if hasattr(m, "value") and not m.labels}
    assert counters["vjax:generation_tokens"] == 0
    assert counters["vjax:prompt_tokens"] == 2 * sum(map(len, PROMPTS)) + len(PROMPTS[4])


def test_states_of_every_token(embedder, folder):
    path = make_pooling_checkpoint("llama-bare", folder)
    outputs = embedder.encode(PROMPTS, pooling_task="token_embed", **QUIET)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert type(output) is PoolingRequestOutput and output.num_cached_tokens == 0
        assert output.outputs.data.dtype == np.float32
        close(output.outputs.data, unit(hf_states(path, prompt)))
    (default,) = embedder.encode([PROMPTS[2]], **QUIET)
    close(default.outputs.data, unit(hf_states(path, PROMPTS[2])[-1]))


def test_truncation_and_the_longest_prompt(embedder, folder):
    path = make_pooling_checkpoint("llama-bare", folder)
    long = PROMPTS[6] + PROMPTS[5]
    for kwargs, kept in [
        ({"truncate_prompt_tokens": 20}, long[-20:]),
        ({"truncate_prompt_tokens": -1}, long[-MAX_LEN:]),
        ({"pooling_params": PoolingParams(truncate_prompt_tokens=9)}, long[-9:]),
        ({"tokenization_kwargs": {"truncate_prompt_tokens": 5, "truncation_side": "right"}}, long[:5]),
    ]:
        (output,) = embedder.embed(long, **kwargs, **QUIET)
        assert output.prompt_token_ids == kept
        close(output.outputs.embedding, unit(hf_states(path, kept)[-1]))


def test_cosine_scores(embedder, folder):
    path = make_pooling_checkpoint("llama-bare", folder)
    vectors = [unit(hf_states(path, prompt)[-1]) for prompt in PROMPTS]
    ids = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    one = embedder.score(ids[0], ids[1:], **QUIET)
    close([o.outputs.score for o in one], [vectors[0] @ v for v in vectors[1:]])
    assert one[0].prompt_token_ids == PROMPTS[0] + PROMPTS[1]
    many = embedder.score(ids[:4], ids[4:], **QUIET)
    close([o.outputs.score for o in many], [a @ b for a, b in zip(vectors[:4], vectors[4:], strict=True)])


def test_mean_by_sentence_transformers_files(folder):
    """Files of sentence-transformers make a model that generates pool; without a Normalize module nothing is scaled."""
    plain = make_pooling_checkpoint("qwen2-causal", folder)
    path = as_sentence_transformer(plain, folder, {"pooling_mode_mean_tokens": True}, normalize=False)
    with LLM(path, **SMALL) as llm:
        outputs = llm.embed(PROMPTS, **QUIET)
        with_length = llm.embed(PROMPTS[5], pooling_params=PoolingParams(use_activation=True), **QUIET)
        again = llm.embed(PROMPTS[5], **QUIET)
        llm.sleep(level=1)
        llm.wake_up()
        awake = llm.embed(PROMPTS[5], **QUIET)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        close(output.outputs.embedding, hf_states(plain, prompt).mean(axis=0))
    close(with_length[0].outputs.embedding, unit(hf_states(plain, PROMPTS[5]).mean(axis=0)))
    assert again[0].num_cached_tokens == 0
    close(again[0].outputs.embedding, outputs[5].outputs.embedding)
    assert again[0].outputs == awake[0].outputs


def test_first_token_and_shorter_embeddings(folder):
    path = make_pooling_checkpoint("qwen3-bare", folder)
    v0 = {"use_v1": False, "enable_chunked_prefill": True}
    with LLM(path, pooler_config=PoolerConfig(pooling_type="CLS"), **v0, **SMALL) as llm:
        outputs = llm.embed(PROMPTS, **QUIET)
        short = llm.embed(PROMPTS[:2], pooling_params=[PoolingParams(dimensions=16), PoolingParams()], **QUIET)
        with pytest.raises(VjaxValidationError, match=r"dimensions=8 is none of the sizes .*: 16, 32"):
            llm.embed(PROMPTS, pooling_params=PoolingParams(dimensions=8), **QUIET)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        close(output.outputs.embedding, unit(hf_states(path, prompt)[0]))
    close(short[0].outputs.embedding, unit(hf_states(path, PROMPTS[0])[0, :16]))
    close(short[1].outputs.embedding, outputs[1].outputs.embedding)


# ---- classes, scores and rewards ----------------------------------------------------------------------------------


def test_classes(folder):
    path = make_pooling_checkpoint("llama-classes", folder)
    with LLM(path, **SMALL) as llm:
        probs = llm.classify(PROMPTS, **QUIET)
        logits = llm.classify(PROMPTS, pooling_params=PoolingParams(use_activation=False), **QUIET)
        tokens = llm.encode(PROMPTS[5], pooling_task="token_classify", **QUIET)[0].outputs.data
        # Only the front end says how the states of a prompt are pooled.
        pooling = llm.llm_engine.config.model.pooling
        assert pooling is not None
        llm.llm_engine._inputs._pooling = dataclasses.replace(pooling, sequence_type="MEAN")
        means = llm.encode(PROMPTS, PoolingParams(use_activation=False), pooling_task="classify", **QUIET)
        for call, parts in [(llm.embed, "embed"), (lambda p, **kw: llm.score(p, p, **kw), "score")]:
            with pytest.raises(VjaxValidationError, match=f"pooling_task='{parts}' is not what this model does"):
                call("x", **QUIET)
    head = hf_head(path)
    for prompt, p, raw, mean in zip(PROMPTS, probs, logits, means, strict=True):
        wanted = hf_class_logits(path, prompt)
        close(mean.outputs.data, hf_states(path, prompt).mean(axis=0) @ head.T)
        close(raw.outputs.probs, wanted)
        close(p.outputs.probs, softmax(wanted))
        assert p.outputs.num_classes == 3
    close(tokens, softmax(hf_states(path, PROMPTS[5]) @ head.T))


def hf_head(path: str) -> np.ndarray:
    from safetensors.numpy import load_file

    return load_file(Path(path) / "model.safetensors")["score.weight"]


def test_pairs(folder):
    """A head of one label scores both texts in one prompt."""
    path = make_pooling_checkpoint("qwen3-reranker", folder)
    words = ["<s>", "</s>", "what", "is", "jax", "a", "library", "city", "[SEP]"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<s>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A [SEP] $B </s>", special_tokens=[("<s>", 0), ("[SEP]", 8), ("</s>", 1)]
    )
    backend.save(str(Path(path) / "tokenizer.json"))
    queries, documents = ["what is jax", "a city"], ["jax is a library", "what is a city"]
    ids = [[0, 2, 3, 4, 8, 4, 3, 5, 6, 1], [0, 2, 3, 4, 8, 2, 3, 5, 7, 1], [0, 5, 7, 8, 2, 3, 5, 7, 1]]
    with LLM(path, **{**SMALL, "skip_tokenizer_init": False}) as llm:
        one = llm.score(queries[0], documents, **QUIET)
        many = llm.score(queries, documents, pooling_params=PoolingParams(use_activation=False), **QUIET)
        (single,) = llm.classify("what is jax", **QUIET)
        cut = llm.score(queries[0], documents[0], truncate_prompt_tokens=4, **QUIET)[0]
        with pytest.raises(VjaxValidationError, match=r"text_2: \[3, 4\] is no text"):
            llm.score("jax", [[3, 4]], **QUIET)
        with pytest.raises(VjaxValidationError, match="3 and 2 texts; pass one text and one or more, or equally many"):
            llm.score(["a", "b", "c"], ["d", "e"], **QUIET)
    assert [o.prompt_token_ids for o in one] == ids[:2]
    assert [o.prompt_token_ids for o in many] == [ids[0], ids[2]] and cut.prompt_token_ids == ids[0][-4:]
    close([o.outputs.score for o in one], [sigmoid(hf_class_logits(path, i))[0] for i in ids[:2]])
    close([o.outputs.score for o in many], [hf_class_logits(path, i)[0] for i in (ids[0], ids[2])])
    close(single.outputs.probs, sigmoid(hf_class_logits(path, [0, 2, 3, 4])))


def test_rewards_of_steps(folder):
    path, head = make_reward_checkpoint(folder)
    plain = make_pooling_checkpoint("qwen2-causal", folder)
    prompt = [*PROMPTS[5][:40], 99, *PROMPTS[5][40:], 99]
    with LLM(path, task="reward", pooler_config={"step_tag_id": 99}, **SMALL) as llm:
        (steps,) = llm.reward(prompt, **QUIET)
        (good,) = llm.reward(
            prompt, pooling_params=PoolingParams(returned_token_ids=[1], use_activation=False), **QUIET
        )
    inner = np.maximum(hf_states(plain, prompt) @ head["score.0.weight"].T + head["score.0.bias"], 0)
    logits = inner @ head["score.2.weight"].T + head["score.2.bias"]
    at = [i for i, token in enumerate(prompt) if token == 99]
    close(steps.outputs.data, softmax(logits[at]))
    close(good.outputs.data, logits[at][:, [1]])


# ---- engines -------------------------------------------------------------------------------------------------------


def test_a_model_that_generates_says_what_to_do(folder):
    with LLM(make_pooling_checkpoint("qwen2-causal", folder), **SMALL) as llm:
        for call in (llm.embed, llm.encode, llm.classify, llm.reward, lambda p, **kw: llm.score(p, p, **kw)):
            with pytest.raises(ValueError, match=r"runner='pooling' .*convert='embed'"):
                call("def f(", **QUIET)
        with pytest.raises(ValueError, match="runner='pooling'"):
            llm.llm_engine.add_request("r", [5], PoolingParams())
        assert not llm.llm_engine.has_unfinished_requests()


@pytest.mark.parametrize(
    ("method", "prompts", "kwargs", "parts"),
    [
        ("embed", [[5], [160]], {}, "prompts\\[1\\]: .*160 is out of vocabulary"),
        ("embed", [[5], [7] * (MAX_LEN + 1)], {}, f"longer than the maximum model length of {MAX_LEN}"),
        ("embed", [[5], []], {}, "cannot be empty"),
        ("embed", [[5]], {"pooling_params": SamplingParams()}, "pooling_params=.* pass a PoolingParams"),
        ("embed", [[5], [6]], {"pooling_params": [PoolingParams()]}, "1 entries for 2 prompts"),
        ("embed", [[5]], {"pooling_params": PoolingParams(dimensions=8)}, "dimensions=8 shortens .*is_matryoshka"),
        ("embed", [[5]], {"pooling_params": PoolingParams(task="classify")}, "task='classify' contradicts the call"),
        ("embed", [[5]], {"pooling_params": PoolingParams(step_tag_id=3)}, "step_tag_id=3 is for .*'STEP'"),
        ("embed", [[5]], {"pooling_params": PoolingParams(normalize=True, use_activation=False)}, "contradicts"),
        ("embed", [[5]], {"truncate_prompt_tokens": MAX_LEN + 1}, f"in \\[1, {MAX_LEN}\\]"),
        ("embed", [[5]], {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens=0 leaves nothing"),
        ("encode", [[5]], {"pooling_task": "plugin"}, "pooling_task='plugin' must be one of embed"),
        ("classify", [[5]], {}, "'classify' is not what this model does, which is embed, token_embed"),
        ("generate", [[5]], {}, "pools and generates no text.*runner='generate'"),
        ("embed", [[5]], {"lora_request": 3}, "lora_request=3 is not supported by LLM.embed"),
    ],
)
def test_bad_input(embedder, still_works, method, prompts, kwargs, parts):
    with pytest.raises(ValueError, match=parts):
        getattr(embedder, method)(prompts, **kwargs, **QUIET)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"dimensions": 0}, "dimensions=0 must be an integer of at least 1"),
        ({"normalize": 1}, "normalize=1 must be True, False or None"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens=-2"),
        ({"returned_token_ids": []}, "returned_token_ids"),
    ],
)
def test_bad_parameters(values, parts):
    with pytest.raises(VjaxValidationError, match=parts):
        PoolingParams(**values)


def test_a_step_that_fails_ends_its_own_requests(embedder, still_works, monkeypatch):
    engine = embedder.llm_engine
    for i, prompt in enumerate((PROMPTS[5], PROMPTS[6], PROMPTS[4])):
        engine.add_request(str(i), prompt, PoolingParams(task="token_embed"))
    runner = engine._core.runner
    execute, calls = runner.execute, []

    def fail_once(scheduled):
        calls.append(scheduled)
        if len(calls) == 2:
            raise EngineStepError("the device is gone")
        return execute(scheduled)

    monkeypatch.setattr(runner, "execute", fail_once)
    outputs = {}
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
    failed = [i for i, output in outputs.items() if output.error]
    assert failed == ["0"] and "the device is gone" in outputs["0"].error and outputs["0"].outputs.data.size == 0
    assert EmbeddingRequestOutput.from_base(outputs["0"]).outputs.embedding == []
    path = engine.config.model.model
    close(outputs["1"].outputs.data, unit(hf_states(path, PROMPTS[6])))
    close(outputs["2"].outputs.data, unit(hf_states(path, PROMPTS[4])))


def test_aborted_requests(embedder, still_works):
    engine = embedder.llm_engine
    for i, prompt in enumerate((PROMPTS[5], PROMPTS[6], PROMPTS[4])):
        engine.add_request(str(i), prompt, PoolingParams())
    engine.step()
    engine.abort_request("1")
    embedder.sleep(level=0, mode="abort")
    embedder.wake_up()
    outputs = engine.step()
    assert [(o.request_id, o.finished, o.error, o.outputs.data.size) for o in outputs] == [
        ("0", True, "abort", 0),
        ("2", True, "abort", 0),
    ]


def test_async(folder):
    path = make_pooling_checkpoint("llama-bare", folder)
    args = AsyncEngineArgs.from_kwargs(model=path, **SMALL)

    async def encode(engine, number: int, **params):
        prompt = {"prompt_token_ids": PROMPTS[number]}
        return [o async for o in engine.encode(prompt, PoolingParams(**params), str(number))]

    async def main(engine) -> list[Any]:
        calls = [encode(engine, i) for i in range(len(PROMPTS))]
        return await asyncio.gather(*calls, encode(engine, 0, task="score"), return_exceptions=True)

    with AsyncLLM(args, multiprocess=False) as engine:
        *results, refused = asyncio.run(main(engine))
        assert engine.get_num_unfinished_requests() == 0
    for prompt, (output,) in zip(PROMPTS, results, strict=True):
        close(output.outputs.data, unit(hf_states(path, prompt)[-1]))
    assert isinstance(refused, VjaxValidationError)


@pytest.mark.parametrize(
    ("name", "arguments", "parts"),
    [
        ("llama-bare", {"runner": "generate"}, "LlamaModel has no language model head; pass runner='pooling'"),
        ("qwen2-causal", {"runner": "generate", "convert": "embed"}, "runner='generate' forbids it"),
        ("qwen2-causal", {"pooler_config": {"pooling_type": "LAST"}}, "generates; pass runner='pooling' as well"),
        ("llama-bare", {"pooler_config": {"pooling_type": "MAX"}}, "must be one of LAST, MEAN, CLS, ALL, STEP"),
        ("llama-bare", {"pooler_config": {"softmax": True}}, "no keys but pooling_type"),
        ("llama-bare", {"pooler_config": {"dimensions": 16}}, "dimensions=16 shortens embeddings"),
        ("llama-bare", {"pooler_config": {}, "override_pooler_config": {}}, "one argument; pass pooler_config"),
        ("llama-classes", {"pooler_config": {"normalize": True}}, "normalize=True is for embeddings"),
        ("qwen2-causal", {"convert": "classify"}, "score.weight"),
        ("llama-bare", {"logits_processors": ["a:B"]}, "logits_processors is for text generation"),
    ],
)
def test_bad_engine_arguments(folder, name, arguments, parts):
    path = make_pooling_checkpoint(name, folder)
    with pytest.raises(ValueError, match=parts):
        LLM(path, **SMALL, **arguments)


def test_files_of_sentence_transformers_that_ask_for_more(folder, tmp_path):
    path = make_pooling_checkpoint("llama-bare", folder)
    for pooling, parts in [
        ({"pooling_mode_max_tokens": True}, "asks for pooling_mode_max_tokens"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "exactly one"),
    ]:
        target = as_sentence_transformer(path, tmp_path, pooling, normalize=True)
        with pytest.raises(ValueError, match=parts):
            LLM(target, **SMALL)
    modules = [{"type": "sentence_transformers.models.Dense"}]
    (Path(target) / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="names Dense; supported are Transformer, Pooling and Normalize"):
        LLM(target, **SMALL)


def test_a_pooling_type_stands_for_one_of_the_two():
    assert (PoolerConfig("MEAN").sequence_type, PoolerConfig("STEP").token_type) == ("MEAN", "STEP")
    with pytest.raises(ConfigError, match="excludes"):
        PoolerConfig(pooling_type="MEAN", tok_pooling_type="ALL")
