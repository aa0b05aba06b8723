from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from vjax.config.cache import CacheConfig
from vjax.config.engine_config import EngineConfig, LoadConfig, ModelConfig
from vjax.config.scheduler import SchedulerConfig
from vjax.engine.input_processor import InputProcessor
from vjax.errors import VjaxValidationError
from vjax.sampling_params import SamplingParams
from vjax.text.tokenizer import Tokenizer

VOCAB_SIZE = 300
MAX_MODEL_LEN = 64


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    return Tokenizer(backend, {"eos_token": "<|end|>"})


def make(tokenizer: Tokenizer | None = None, *, seed: int = 0, eos=(), **model) -> InputProcessor:
    config = EngineConfig(
        model=ModelConfig(
            model="m",
            tokenizer="m",
            skip_tokenizer_init=tokenizer is None,
            dtype="float32",
            seed=seed,
            max_model_len=MAX_MODEL_LEN,
            **model,
        ),
        cache=CacheConfig(),
        scheduler=SchedulerConfig(
            max_num_seqs=4, max_num_batched_tokens=64, max_model_len=MAX_MODEL_LEN, enable_chunked_prefill=True
        ),
        load=LoadConfig(),
        disable_log_stats=True,
        use_v1=True,
    )
    return InputProcessor(config, vocab_size=VOCAB_SIZE, tokenizer=tokenizer, eos_token_ids=eos)


def test_prompt_forms(tokenizer):
    inputs = make(tokenizer)
    ids = tokenizer.encode("héllo")
    for prompt, text in [
        ("héllo", "héllo"),
        ({"prompt": "héllo"}, "héllo"),
        ({"prompt_token_ids": ids}, None),
        ({"prompt": "kept as it is", "prompt_token_ids": ids}, "kept as it is"),
        ({"prompt": "héllo", "prompt_token_ids": None, "cache_salt": None, "multi_modal_data": None}, "héllo"),
        (ids, None),
        (tuple(ids), None),
        (np.asarray(ids, np.int32), None),
    ]:
        processed = inputs.process("r", prompt, SamplingParams(), priority=3, arrival_time=7.0)
        (request,) = processed.requests
        assert (processed.prompt, processed.prompt_token_ids) == (text, ids)
        assert request.prompt_token_ids == ids
        assert all(type(i) is int for i in request.prompt_token_ids)
        assert (request.request_id, request.priority, request.arrival_time, request.cache_salt) == ("r", 3, 7.0, None)
    salted = inputs.process("r", {"prompt": "x", "cache_salt": "s"}, SamplingParams(n=2))
    assert [request.cache_salt for request in salted.requests] == ["s", "s"]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("", "cannot be empty"),
        ([], "cannot be empty"),
        ({"prompt_token_ids": []}, "cannot be empty"),
        ({"prompt": ""}, "cannot be empty"),
        ({}, "neither a prompt nor prompt_token_ids"),
        (3, "is a int; pass a text"),
        (None, "is a NoneType; pass a text"),
        ({"prompt": 3}, "must be a text"),
        ({"prompt_token_ids": "abc"}, "is a str; pass"),
        ([1, "a"], "'a' is a str; token ids must be integers"),
        ([1, True], "True is a bool"),
        ([1, 1.5], "1.5 is a float"),
        ([1, 300], r"=300 is out of vocabulary: the model's 300 token ids are 0\.\.299"),
        ([-1], "=-1 is out of vocabulary"),
        ({"prompt": "x", "cache_salt": ""}, "cache_salt='' must be a non-empty string"),
        ({"prompt": "x", "cache_salt": 3}, "cache_salt=3 must be"),
        ({"prompt": "x", "multi_modal_data": {}}, "has the key 'multi_modal_data'; only prompt"),
        ({"role": "user", "content": "x"}, "cache_salt are supported; LLM.chat takes messages"),
        ([1] * 64, r"length 64\).*maximum model length of 64.*max_model_len"),
        ("x" * 100, r"length 100\).*maximum model length of 64"),
    ],
)
def test_bad_prompts(tokenizer, prompt, text):
    with pytest.raises(VjaxValidationError, match=text):
        make(tokenizer).process("r", prompt, SamplingParams())


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"truncate_prompt_tokens": 0}, r"truncate_prompt_tokens=0 must be an integer in \[1, 64\].*or -1"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens=-2 must be"),
        ({"truncate_prompt_tokens": 65}, "truncate_prompt_tokens=65 must be"),
        ({"truncate_prompt_tokens": True}, "truncate_prompt_tokens=True must be"),
        ({"truncate_prompt_tokens": 2.0}, r"truncate_prompt_tokens=2.0 must be"),
        ({"truncation_side": "top"}, "truncation_side='top' must be \"left\""),
        ({"add_special_tokens": None}, "add_special_tokens=None must be True or False"),
        ({"max_length": 3}, "has the key 'max_length'; only truncate_prompt_tokens, truncation_side"),
        (3, "tokenization_kwargs=3 must be a mapping"),
    ],
)
def test_bad_tokenization(tokenizer, kwargs, text):
    with pytest.raises(VjaxValidationError, match=text):
        make(tokenizer).process("r", "abc", SamplingParams(), tokenization_kwargs=kwargs)


def test_tokens_are_truncated_without_a_tokenizer():
    for kwargs, ids in [
        (None, [1, 2, 3]),
        ({}, [1, 2, 3]),
        ({"truncate_prompt_tokens": None, "truncation_side": "left"}, [1, 2, 3]),
        ({"truncate_prompt_tokens": np.int64(2)}, [2, 3]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, [1, 2]),
    ]:
        processed = make(None).process("r", [1, 2, 3], SamplingParams(), tokenization_kwargs=kwargs)
        assert processed.prompt_token_ids == ids == processed.requests[0].prompt_token_ids


def test_longest_prompt_has_room_for_one_token(tokenizer):
    processed = make(tokenizer).process("r", [1] * 63, SamplingParams(max_tokens=None))
    assert processed.params.max_tokens == 1


def test_without_tokenizer():
    inputs = make(None, eos=(2, 3))
    assert inputs.process("r", [1], SamplingParams()).requests[0].eos_token_id == 2
    with pytest.raises(VjaxValidationError, match=r"skip_tokenizer_init=True.*prompt_token_ids"):
        inputs.process("r", "text", SamplingParams())
    with pytest.raises(VjaxValidationError, match=r"stop=\['x'\] needs a tokenizer"):
        inputs.process("r", [1], SamplingParams(stop="x"))


def test_the_users_parameters_stay_as_they_are(tokenizer):
    params = SamplingParams(max_tokens=None, stop_token_ids=[5])
    before = dataclasses.replace(params)
    processed = make(tokenizer, generation_eos_token_ids=(6, 7)).process("r", [1, 2], params)
    assert params == before
    assert processed.params.max_tokens == MAX_MODEL_LEN - 2
    assert processed.params.stop_token_ids == [5, 6, 7]


def test_eos(tokenizer):
    eos = tokenizer.eos_token_id
    inputs = make(tokenizer, generation_eos_token_ids=(eos, 9), eos=(4,))
    request = inputs.process("r", [1], SamplingParams()).requests[0]
    assert (request.eos_token_id, request.sampling_params.stop_token_ids) == (eos, [9])
    request = inputs.process("r", [1], SamplingParams(ignore_eos=True, stop_token_ids=[8])).requests[0]
    assert (request.eos_token_id, request.sampling_params.stop_token_ids) == (None, [8])
    assert request.ignored_eos_token_ids == (eos, 9)


def test_seeds(tokenizer):
    def seeds(engine_seed: int, params: SamplingParams) -> list[int | None]:
        inputs = make(tokenizer, seed=engine_seed)
        return [inputs.process(str(i), [1], params).requests[0].sampling_params.seed for i in range(3)]

    drawn = seeds(0, SamplingParams())
    assert len(set(drawn)) == 3
    assert drawn == seeds(0, SamplingParams())
    assert drawn != seeds(1, SamplingParams())
    assert all(isinstance(s, int) and 0 <= s < 2**63 for s in drawn)
    assert seeds(0, SamplingParams(seed=5)) == [5, 5, 5]


def test_n_becomes_requests_of_their_own(tokenizer):
    processed = make(tokenizer).process("abc", "hi", SamplingParams(n=3, seed=2**63 - 2))
    assert [r.request_id for r in processed.requests] == ["0_abc", "1_abc", "2_abc"]
    assert [r.sampling_params.seed for r in processed.requests] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert {r.sampling_params.n for r in processed.requests} == {1}
    assert processed.params.n == 3


def test_bad_parameters(tokenizer):
    inputs = make(tokenizer)
    with pytest.raises(VjaxValidationError, match="pass a SamplingParams"):
        inputs.process("r", [1], {"temperature": 0})  # type: ignore[arg-type]
    with pytest.raises(VjaxValidationError, match="priority='high' must be an integer"):
        inputs.process("r", [1], SamplingParams(), priority="high")  # type: ignore[arg-type]
    with pytest.raises(VjaxValidationError, match="stop_token_ids=300 is out of vocabulary"):
        inputs.process("r", [1], SamplingParams(stop_token_ids=[1, 300]))
    params = SamplingParams()
    params.max_tokens = 0  # assigned after construction
    with pytest.raises(VjaxValidationError, match="max_tokens=0"):
        inputs.process("r", [1], params)


def test_min_tokens_masks_at_most_64_ids(tokenizer):
    inputs = make(tokenizer)
    inputs.process("r", [1], SamplingParams(min_tokens=1, stop_token_ids=list(range(63))))
    too_many = list(range(64))
    with pytest.raises(VjaxValidationError, match=r"at most 64 EOS and stop token ids, and the request has 65"):
        inputs.process("r", [1], SamplingParams(min_tokens=1, stop_token_ids=too_many))
    with pytest.raises(VjaxValidationError, match="the request has 65"):  # EOS is masked, though it is ignored later
        inputs.process("r", [1], SamplingParams(min_tokens=1, stop_token_ids=too_many, ignore_eos=True))
    inputs.process("r", [1], SamplingParams(stop_token_ids=too_many))


def test_default_sampling_params(tokenizer):
    inputs = make(tokenizer, default_sampling_params={"temperature": 0.5, "top_k": 7})
    params = inputs.default_sampling_params()
    assert (params.temperature, params.top_k, params.max_tokens) == (0.5, 7, 16)
