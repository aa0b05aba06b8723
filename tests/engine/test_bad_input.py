"""Bad input is a ValueError that names the value, the limit and the knob, and leaves the engine as it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from vjax import LLM, ConfigError, ModelLoadError, OutOfMemoryError, SamplingParams, VjaxValidationError
from vjax.weights.hub import resolve_model_path

pytestmark = pytest.mark.usefixtures("shared_programs")

MAX_LEN = 128
SMALL = {"max_model_len": MAX_LEN, "max_num_seqs": 4, "max_num_batched_tokens": 128, "kv_cache_memory_bytes": 8 << 20}
GREEDY = SamplingParams(temperature=0.0, max_tokens=4)
GOOD = ["def f(", {"prompt_token_ids": [5, 6, 7]}]


@pytest.fixture(scope="module")
def llm():
    with LLM("vjax-tiny", **SMALL, disable_log_stats=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(llm):
    return [o.outputs[0].token_ids for o in llm.generate(GOOD, GREEDY, use_tqdm=False)]


@pytest.fixture
def still_works(llm, expected):
    """The engine is idle and intact after the test, and the next call gives what it always gave."""
    yield
    engine = llm.llm_engine
    engine._core.scheduler.check_integrity()
    assert not engine.has_unfinished_requests() and engine.get_num_unfinished_requests() == 0
    gauges = {m.name: m.value for m in llm.get_metrics() if m.name.startswith(("vjax:num_requests", "vjax:kv"))}
    assert set(gauges.values()) == {0}
    assert [o.outputs[0].token_ids for o in llm.generate(GOOD, GREEDY, use_tqdm=False)] == expected


def says(error: pytest.ExceptionInfo, *parts: str) -> None:
    text = str(error.value)
    assert isinstance(error.value, VjaxValidationError) and isinstance(error.value, ValueError)
    for part in parts:
        assert part in text, text


# ---- prompts ------------------------------------------------------------------------------------------------------

BAD_PROMPTS = [
    ("", ["cannot be empty", "at least 1 token"]),
    ([], ["cannot be empty", "at least 1 token"]),
    ({"prompt": ""}, ["cannot be empty"]),
    ({"prompt_token_ids": []}, ["cannot be empty"]),
    ([7, 4096], ["prompt_token_ids=4096", "0..4095", "tokenizer"]),
    ([-1], ["prompt_token_ids=-1", "0..4095"]),
    ([7] * MAX_LEN, [f"length {MAX_LEN}", f"maximum model length of {MAX_LEN}", "max_model_len"]),
    ([7] * 1000, ["length 1000", f"maximum model length of {MAX_LEN}", "max_model_len"]),
    ("x " * 500, [f"maximum model length of {MAX_LEN}", "max_model_len"]),
    ([1.5], ["prompt_token_ids=1.5", "integers"]),
    ([True], ["prompt_token_ids=True", "integers"]),
    (None, ["prompt=None", "pass a text"]),
    ({"text": "x"}, ["'text'", "only prompt, prompt_token_ids, cache_salt"]),
    ({"prompt": "x", "cache_salt": ""}, ["cache_salt=''", "non-empty string"]),
    ("\ud800", ["lone surrogate"]),
]


@pytest.mark.parametrize(("prompt", "parts"), BAD_PROMPTS)
def test_prompts(llm, still_works, prompt, parts):
    with pytest.raises(ValueError) as e:
        llm.generate([*GOOD, prompt, *GOOD], GREEDY, use_tqdm=False)
    says(e, "prompts[2]: ", *parts)


@pytest.mark.parametrize("prompt", ["", {"prompt_token_ids": [4096]}, [7] * MAX_LEN, [1.5, 2]])
def test_one_prompt(llm, still_works, prompt):
    if isinstance(prompt, list) and isinstance(prompt[0], float):
        prompt = {"prompt_token_ids": prompt}
    with pytest.raises(VjaxValidationError) as e:
        llm.generate(prompt, GREEDY, use_tqdm=False)
    assert "prompts[" not in str(e.value)
    with pytest.raises(VjaxValidationError):
        llm.llm_engine.add_request("r", prompt, GREEDY)


@pytest.mark.parametrize("prompts", [None, 3, {"a", "b"}, b"abc", 1.5])
def test_things_that_are_no_prompts(llm, still_works, prompts):
    with pytest.raises(ValueError) as e:
        llm.generate(prompts, GREEDY, use_tqdm=False)
    says(e, "prompts=", f"is a {type(prompts).__name__}", "pass a text, a list of token ids")


def test_the_longest_prompt_that_fits(llm, still_works):
    (output,) = llm.generate([7] * (MAX_LEN - 1), GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 1


# ---- parameters and priorities ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ({"sampling_params": [GREEDY] * 3}, ["sampling_params has 3 entries for 2 prompts", "one per prompt"]),
        ({"sampling_params": []}, ["sampling_params has 0 entries for 2 prompts"]),
        ({"sampling_params": [GREEDY, None]}, ["sampling_params[1]=None", "pass a SamplingParams"]),
        ({"sampling_params": {"temperature": 0}}, ["sampling_params={'temperature': 0}", "pass a SamplingParams"]),
        ({"sampling_params": 3}, ["sampling_params=3", "pass a SamplingParams"]),
        ({"priority": [1]}, ["priority has 1 entries for 2 prompts", "one per prompt"]),
        ({"priority": []}, ["priority has 0 entries for 2 prompts"]),
        ({"priority": 1}, ["priority=1 is a int", "one integer per prompt"]),
        ({"priority": [0, 1.5]}, ["prompts[1]", "priority=1.5", "an integer"]),
    ],
)
def test_lists_that_do_not_fit_the_prompts(llm, still_works, kwargs, parts):
    with pytest.raises(ValueError) as e:
        llm.generate(GOOD, **{"sampling_params": GREEDY} | kwargs, use_tqdm=False)
    says(e, *parts)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"max_tokens": 0}, ["max_tokens=0", "at least 1", "None"]),
        ({"max_tokens": -3}, ["max_tokens=-3", "at least 1"]),
        ({"min_tokens": 17}, ["min_tokens=17", "at most max_tokens=16", "lower min_tokens or raise max_tokens"]),
        ({"min_tokens": -1}, ["min_tokens=-1", "at least 0"]),
        ({"n": 2, "temperature": 0}, ["n=2", "temperature=0", "set n=1 or a temperature above 0"]),
        ({"n": 0}, ["n=0", "[1, 16384]"]),
        ({"temperature": -1}, ["temperature=-1", "[0.0, 2.0]"]),
        ({"temperature": float("nan")}, ["temperature=nan", "[0.0, 2.0]"]),
        ({"top_p": 0}, ["top_p=0", "(0.0, 1.0]"]),
        ({"top_k": -2}, ["top_k=-2", "at least -1"]),
        ({"min_p": 2}, ["min_p=2", "[0.0, 1.0]"]),
        ({"seed": 2**63}, [f"seed={2**63}", str(2**63 - 1)]),
        ({"stop": ""}, ["stop=''", "empty string"]),
        ({"stop": [1]}, ["stop=[1]", "list of strings"]),
        ({"stop_token_ids": ["a"]}, ["stop_token_ids=['a']", "'a' is not one"]),
        ({"prompt_logprob_start": 1}, ["prompt_logprob_start=1", "not supported yet"]),
        ({"presence_penalty": 3}, ["presence_penalty=3", "[-2.0, 2.0]"]),
        ({"structured_outputs": {}}, ["structured_outputs={}", "exactly one of json, regex, choice"]),
    ],
)
def test_sampling_parameters(fields, parts):
    with pytest.raises(ValueError) as e:
        SamplingParams(**fields)
    says(e, *parts)
    assert e.value.parameter in fields


@pytest.mark.parametrize(
    ("name", "value"), [("max_tokens", 0), ("n", 2), ("min_tokens", 9), ("stop_token_ids", [5000]), ("stop", [""])]
)
def test_parameters_changed_after_construction(llm, still_works, name, value):
    params = SamplingParams(temperature=0.0, max_tokens=4)
    setattr(params, name, value)
    with pytest.raises(ValueError) as e:
        llm.generate([*GOOD, "x"], [GREEDY, params, GREEDY], use_tqdm=False)
    says(e, "prompts[1]: ", f"{name}=")


def test_too_many_masked_ids(llm, still_works):
    params = SamplingParams(max_tokens=4, min_tokens=2, stop_token_ids=list(range(100, 200)))
    with pytest.raises(ValueError) as e:
        llm.generate("x", params, use_tqdm=False)
    says(e, "min_tokens=2", "at most 64", "fewer stop_token_ids, or min_tokens=0")


def test_conversations(llm, still_works):
    for messages, parts in [
        ([], ["non-empty list of messages"]),
        ([[]], ["non-empty list of messages"]),
        ("hello", ["non-empty list of messages"]),
        ({"role": "user", "content": "x"}, ["non-empty list of messages"]),
        (["hello"], ["messages[0] is a str"]),
        ([{"content": "x"}], ["messages[0]", '"role"']),
        ([{"role": "user"}], ["messages[0]", '"content"']),
        ([{"role": "user", "content": [{"type": "image_url"}]}], ["'image_url' is not supported"]),
    ]:
        with pytest.raises(ValueError) as e:
            llm.chat(messages, GREEDY, use_tqdm=False)
        says(e, *parts)
    with pytest.raises(ValueError) as e:
        llm.chat([{"role": "user", "content": "x"}], GREEDY, chat_template="{% if", use_tqdm=False)
    says(e, "not valid Jinja")


# ---- engine arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "kind", "parts"),
    [
        ({"block_size": 8}, ConfigError, ["block_size=8", "16, 32, 64, 128"]),
        ({"max_model_len": 4096}, ConfigError, ["max_model_len=4096", "2048", "pass at most 2048"]),
        ({"max_model_len": 1}, ConfigError, ["max_model_len=1", "at least 2"]),
        ({"max_num_seqs": 500}, ConfigError, ["max_num_batched_tokens=128", "max_num_seqs=500", "raise"]),
        ({"num_gpu_blocks_override": 1}, ConfigError, ["num_gpu_blocks_override=1", "at least 2"]),
        (
            {"num_gpu_blocks_override": 8},
            OutOfMemoryError,
            ["8 blocks of 16 tokens", "max_model_len=128", "needs 9", "at most 112", "raise num_gpu_blocks_override"],
        ),
        (
            {"kv_cache_memory_bytes": 1 << 19},
            OutOfMemoryError,
            [
                "kv_cache_memory_bytes=524288",
                "max_model_len=128",
                "needs 9",
                "raise kv_cache_memory_bytes to at least 1179648",
            ],
        ),
        ({"gpu_memory_utilization": 1.5}, ConfigError, ["gpu_memory_utilization=1.5", "(0, 1]"]),
        ({"max_seq_len": 64}, ConfigError, ["unknown argument 'max_seq_len'", "did you mean max_model_len?"]),
        ({"tokenizer": "/no/such/dir"}, ConfigError, ["tokenizer='/no/such/dir'", "no such directory"]),
        ({"tokenizer": "no/such-repo"}, ConfigError, ["tokenizer='no/such-repo'", "skip_tokenizer_init=True"]),
        ({"generation_config": "/no/such"}, ConfigError, ["generation_config='/no/such'", '"vllm"']),
        ({"load_format": "pt"}, ConfigError, ["load_format='pt'", "auto, safetensors, orbax, dummy"]),
    ],
)
def test_engine_arguments(kwargs, kind, parts):
    with pytest.raises(ValueError) as e:
        LLM("vjax-tiny", **SMALL | kwargs)
    assert type(e.value) is kind
    says(e, *parts)


def test_the_length_that_the_message_offers_works():
    with LLM("vjax-tiny", **SMALL | {"num_gpu_blocks_override": 8, "max_model_len": 112}) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
        assert len(llm.generate([7] * 100, params, use_tqdm=False)[0].outputs[0].token_ids) == 12


class FakeGpu:
    """A device of which only the memory matters."""

    platform = "gpu"
    device_kind = "fake GPU"

    def __init__(self, limit: int, in_use: int = 0):
        self._stats = {"bytes_limit": limit, "bytes_in_use": in_use}

    def memory_stats(self) -> dict[str, int]:
        return self._stats


def test_gpu_memory(llm):
    import jax
    import numpy as np

    from vjax.models.registry import arch_config_from_hf, read_hf_config
    from vjax.runner.memory import check_weights_fit, num_kv_blocks

    config = llm.llm_engine.config
    weights = [jax.ShapeDtypeStruct((1 << 20, 1 << 10), np.float32)]
    check_weights_fit(weights, config, FakeGpu(5 << 30))
    with pytest.raises(ValueError) as e:
        check_weights_fit(weights, config, FakeGpu(5 << 30, in_use=2 << 30))
    assert type(e.value) is OutOfMemoryError
    says(e, "4.00 GiB", "3.00 GiB", "gpu_memory_utilization=0.92")

    config = dataclasses.replace(config, cache=dataclasses.replace(config.cache, kv_cache_memory_bytes=None))
    arch = arch_config_from_hf(read_hf_config(resolve_model_path("vjax-tiny")))
    with pytest.raises(ValueError) as e:
        num_kv_blocks(
            config, arch, kv_head_dim=64, kv_itemsize=2, itemsize=2, weight_bytes=0, device=FakeGpu(128 << 20)
        )
    assert type(e.value) is OutOfMemoryError
    says(e, "gpu_memory_utilization=0.92", f"max_model_len={MAX_LEN}", "needs 9", "Raise gpu_memory_utilization")


def test_the_kv_cache_of_a_small_model_leaves_a_piece_that_is_split(llm):
    """XLA's allocator gives a free piece away whole when less than 128 MiB of it would be left, and the rows of the
    batch and the temporaries of the steps need some."""
    from vjax.models.registry import arch_config_from_hf, read_hf_config
    from vjax.runner import memory

    config = llm.llm_engine.config
    config = dataclasses.replace(config, cache=dataclasses.replace(config.cache, kv_cache_memory_bytes=None))
    arch = arch_config_from_hf(read_hf_config(resolve_model_path("vjax-tiny")))
    limit, sizes = 100 << 30, {"kv_head_dim": 64, "kv_itemsize": 2}
    blocks = memory.num_kv_blocks(config, arch, itemsize=2, weight_bytes=15 << 20, device=FakeGpu(limit), **sizes)
    kv_bytes = blocks * memory.block_bytes(arch, config.cache.block_size, 64, 2)
    with_the_hole_held = limit - (15 << 20) - kv_bytes - (128 << 20)
    assert 2 * (128 << 20) <= with_the_hole_held < 3 * (128 << 20)


# ---- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("/no/such/dir", ["'/no/such/dir'", "neither a directory that exists nor a hub id"]),
        ("./model", ["'./model'", "neither a directory that exists nor a hub id"]),
        ("no such model", ["'no such model'"]),
        ("no/such-repo", ["'no/such-repo'", "Hugging Face hub", "pass the path of a downloaded directory"]),
    ],
)
def test_models_that_do_not_exist(model, parts):
    with pytest.raises(ValueError) as e:
        LLM(model, **SMALL)
    assert type(e.value) is ModelLoadError and "\n" not in str(e.value)
    says(e, *parts)


@pytest.fixture
def model(tmp_path):
    """Makes a copy of the bundled model in which config.json has other values, and files are replaced or left out."""
    source = resolve_model_path("vjax-tiny")

    def make(config: dict | None = None, files: dict[str, bytes | None] | None = None) -> str:
        folder = tmp_path / "model"
        folder.mkdir()
        changed = dict(files or {})
        if config:
            changed["config.json"] = json.dumps(json.loads((source / "config.json").read_text()) | config).encode()
        for path in source.iterdir():
            if path.name not in changed:
                (folder / path.name).symlink_to(path)
        for name, content in changed.items():
            if content is not None:
                (folder / name).write_bytes(content)
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"architectures": ["NoSuchForCausalLM"]}, ["'NoSuchForCausalLM'", "LlamaForCausalLM", "Qwen3ForCausalLM"]),
        ({"architectures": [["x"]]}, ["architectures is [['x']]", "LlamaForCausalLM"]),
        ({"architectures": None}, ["architectures is None", "LlamaForCausalLM"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "'awq'", "unquantised"]),
        ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", "silu"]),
        ({"rope_scaling": {"rope_type": "x"}}, ["rope type 'x'", "llama3"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads (3)", "multiple"]),
        ({"num_hidden_layers": "8"}, ["num_hidden_layers is '8'", "positive integer"]),
        ({"eos_token_id": "0"}, ["eos_token_id is '0'", "token id"]),
        ({"vocab_size": 4000}, ["model.embed_tokens.weight: [4096, 256] in the checkpoint, [4000, 256] from config"]),
        ({"num_hidden_layers": 9}, ["9 missing tensors", "model.layers.8.mlp.down_proj.weight"]),
        ({"num_hidden_layers": 7}, ["9 unexpected tensors", "model.layers.7.mlp.down_proj.weight"]),
    ],
)
def test_config_json(model, config, parts):
    with pytest.raises(ValueError) as e:
        LLM(model(config), **SMALL)
    assert type(e.value) is ModelLoadError
    says(e, *parts)


@pytest.mark.parametrize(
    ("files", "kind", "parts"),
    [
        ({"config.json": None}, ModelLoadError, ["config.json does not exist"]),
        ({"config.json": b"{"}, ModelLoadError, ["config.json cannot be read as JSON"]),
        ({"model.safetensors": None}, ModelLoadError, ["has no weights", 'load_format="dummy"']),
        (
            {"model.safetensors": None, "pytorch_model.bin": b"x"},
            ModelLoadError,
            ["has no weights", "pytorch_model.bin", "convert"],
        ),
        ({"model.safetensors": b""}, ModelLoadError, ["model.safetensors is no intact", "(0 bytes)", "download"]),
        (
            {"model.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"},
            ModelLoadError,
            ["model.safetensors is no intact", "Git LFS pointer", "git lfs pull"],
        ),
        ({"tokenizer.json": None}, ConfigError, ["holds no tokenizer", "skip_tokenizer_init=True"]),
        ({"tokenizer.json": b"{}"}, ConfigError, ["tokenizer.json cannot be read"]),
        ({"tokenizer_config.json": b"{"}, ConfigError, ["tokenizer_config.json is not valid JSON"]),
        ({"tokenizer_config.json": b"[]"}, ConfigError, ["tokenizer_config.json holds no JSON object"]),
        (
            {"generation_config.json": b'{"temperature": -3}'},
            ConfigError,
            ["temperature=-3", "[0.0, 2.0]", 'generation_config="vllm"'],
        ),
    ],
)
def test_files(model, files, kind, parts):
    with pytest.raises(ValueError) as e:
        LLM(model(files=files), **SMALL)
    assert type(e.value) is kind
    says(e, *parts)


@pytest.mark.parametrize("size", [5, 1000, 7_000_000])
def test_truncated_safetensors(model, size):
    content = Path(resolve_model_path("vjax-tiny") / "model.safetensors").read_bytes()
    with pytest.raises(ValueError) as e:
        LLM(model(files={"model.safetensors": content[:size]}), **SMALL)
    assert type(e.value) is ModelLoadError
    says(e, "model.safetensors is no intact safetensors file", f"({size} bytes)", "download it again")


def test_a_chat_needs_a_template(model):
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    with LLM(model(files={"tokenizer_config.json": json.dumps(config).encode()}), **SMALL) as llm:
        with pytest.raises(ValueError) as e:
            llm.chat([{"role": "user", "content": "x"}], GREEDY, use_tqdm=False)
        says(e, "has no chat template", "chat_template=")
        answers = llm.chat(
            [{"role": "user", "content": "def f("}],
            GREEDY,
            chat_template="{{ messages[0].content }}",
            use_tqdm=False,
        )
        assert answers[0].prompt == "def f("
