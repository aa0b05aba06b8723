from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from vjax.config import EngineArgs, EngineConfig
from vjax.errors import ConfigError
from vjax.models.arch import ArchConfig

GIB = 1 << 30


def arch(**changes) -> SimpleNamespace:
    fields = {
        "max_position_embeddings": 4096,
        "vocab_size": 1000,
        "torch_dtype": "bfloat16",
        "max_context_len": 4096,
        "eos_token_ids": (2,),
    }
    return SimpleNamespace(**(fields | changes))


def resolve(model=None, platform="cpu", memory=None, use_v1=True, generation_config=None, **kwargs) -> EngineConfig:
    return EngineArgs(**kwargs).resolve(
        model or arch(),
        platform=platform,
        device_memory_bytes=memory,
        generation_config=generation_config,
        use_v1=use_v1,
    )


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv("VJAX_USE_V1", raising=False)
    monkeypatch.delenv("VLLM_USE_V1", raising=False)


@pytest.mark.parametrize(
    ("requested", "checkpoint", "platform", "expected"),
    [
        ("auto", "bfloat16", "cpu", "float32"),
        ("auto", "float16", "cpu", "float32"),
        ("auto", "bfloat16", "gpu", "bfloat16"),
        ("auto", "torch.float16", "gpu", "float16"),
        ("auto", "float32", "gpu", "bfloat16"),
        ("auto", None, "gpu", "bfloat16"),
        ("float32", "bfloat16", "gpu", "float32"),
        ("half", "bfloat16", "gpu", "float16"),
        ("bfloat16", "float32", "cpu", "bfloat16"),
    ],
)
def test_dtype(requested, checkpoint, platform, expected):
    assert resolve(arch(torch_dtype=checkpoint), platform, dtype=requested).model.dtype == expected


def test_context_length_is_what_the_positions_cover():
    model = arch(max_position_embeddings=4096, max_context_len=16384)
    assert resolve(model).model.max_model_len == 16384
    assert resolve(model, max_model_len=100).scheduler.max_model_len == 100
    assert resolve(model, max_model_len=16384).scheduler.max_model_len == 16384
    with pytest.raises(ConfigError) as e:
        resolve(model, max_model_len=16385)
    text = str(e.value)
    assert "max_model_len=16385" in text and "max_position_embeddings=4096" in text and "at most 16384" in text


def test_the_real_architecture_record_has_what_resolve_reads():
    names = {"max_position_embeddings", "max_context_len", "torch_dtype", "eos_token_ids"}
    assert names <= set(dir(ArchConfig)) | set(ArchConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("platform", "memory", "use_v1", "tokens", "seqs"),
    [
        ("gpu", 80 * GIB, True, 16384, 1024),
        ("gpu", 70 * GIB, True, 16384, 1024),
        ("gpu", 24 * GIB, True, 8192, 256),
        ("gpu", None, True, 8192, 256),
        ("cpu", None, True, 2048, 64),
        ("gpu", 80 * GIB, False, 16384, 256),
        ("cpu", None, False, 4096, 64),
    ],
)
def test_default_batch(platform, memory, use_v1, tokens, seqs):
    config = resolve(None, platform, memory, use_v1).scheduler
    assert (config.max_num_batched_tokens, config.max_num_seqs) == (tokens, seqs)


def test_default_budget_fits_the_other_limits():
    assert resolve(max_num_seqs=4, max_model_len=128).scheduler.max_num_batched_tokens == 512
    assert resolve(max_num_seqs=3000).scheduler.max_num_batched_tokens == 3000
    assert resolve(max_num_batched_tokens=16).scheduler.max_num_seqs == 16
    assert resolve(use_v1=False, max_num_seqs=1).scheduler.max_num_batched_tokens == 4096


def test_modes():
    v1, v0 = resolve(use_v1=True), resolve(use_v1=False)
    for config, on in ((v1, True), (v0, False)):
        assert config.use_v1 is on and config.scheduler.static_batch is not on
        assert config.cache.enable_prefix_caching is on
        assert config.scheduler.enable_chunked_prefill is on and config.scheduler.async_scheduling is on
    v0 = resolve(use_v1=False, enable_prefix_caching=True, enable_chunked_prefill=True, max_num_batched_tokens=64)
    assert v0.cache.enable_prefix_caching and v0.scheduler.enable_chunked_prefill
    assert v0.scheduler.max_num_batched_tokens == 64
    assert not resolve(async_scheduling=False).scheduler.async_scheduling


def test_mode_precedence(monkeypatch):
    monkeypatch.setenv("VJAX_USE_V1", "0")
    assert not EngineArgs().resolve(arch(), platform="cpu").use_v1
    assert EngineArgs().resolve(arch(), platform="cpu", use_v1=True).use_v1
    assert EngineArgs(use_v1=True).resolve(arch(), platform="cpu", use_v1=False).use_v1


@pytest.mark.parametrize(
    ("kwargs", "texts"),
    [
        ({"use_v1": False, "async_scheduling": True}, ["async_scheduling=True", "V1", "VJAX_USE_V1"]),
        (
            {"max_num_batched_tokens": 32, "max_num_seqs": 64},
            ["max_num_batched_tokens=32", "max_num_seqs=64", "raise the one or lower the other"],
        ),
        (
            {"use_v1": False, "max_num_batched_tokens": 1024},
            ["max_num_batched_tokens=1024", "max_model_len=4096", "enable_chunked_prefill=True"],
        ),
        (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 1024},
            ["max_num_batched_tokens=1024", "max_model_len=4096"],
        ),
        ({"long_prefill_token_threshold": 5000}, ["long_prefill_token_threshold=5000", "max_model_len=4096"]),
        (
            {"long_prefill_token_threshold": 8, "use_v1": False},
            ["long_prefill_token_threshold=8", "enable_chunked_prefill=True"],
        ),
    ],
)
def test_contradictions_name_both_sides(kwargs, texts):
    with pytest.raises(ConfigError) as e:
        resolve(**kwargs)
    assert all(text in str(e.value) for text in texts), str(e.value)


@pytest.mark.parametrize(
    ("requested", "resolved"),
    [("auto", "auto"), ("fp8", "float8_e4m3fn"), ("fp8_e4m3", "float8_e4m3fn"), ("bfloat16", "bfloat16")],
)
def test_kv_cache_dtype(requested, resolved):
    assert resolve(dtype="bfloat16", kv_cache_dtype=requested).cache.cache_dtype == resolved


def test_a_16_bit_cache_has_the_dtype_of_the_model():
    with pytest.raises(ConfigError, match="kv_cache_dtype='float16' does not fit a model of dtype bfloat16; pass"):
        resolve(dtype="bfloat16", kv_cache_dtype="float16")


def test_everything_else_is_handed_on():
    config = resolve(
        model=None,
        tokenizer="tok",
        skip_tokenizer_init=True,
        seed=7,
        block_size=64,
        gpu_memory_utilization=0.5,
        kv_cache_memory_bytes=1 << 20,
        num_gpu_blocks_override=9,
        long_prefill_token_threshold=32,
        scheduling_policy="priority",
        load_format="dummy",
        revision="main",
        download_dir="d",
        disable_log_stats=False,
    )
    assert (config.model.model, config.model.tokenizer, config.model.seed) == ("vjax-tiny", "tok", 7)
    assert config.model.skip_tokenizer_init and not config.disable_log_stats
    cache = config.cache
    assert (cache.block_size, cache.gpu_memory_utilization) == (64, 0.5)
    assert (cache.kv_cache_memory_bytes, cache.num_gpu_blocks_override, cache.num_gpu_blocks) == (1 << 20, 9, 0)
    assert (config.scheduler.policy, config.scheduler.long_prefill_token_threshold) == ("priority", 32)
    assert (config.load.load_format, config.load.revision, config.load.download_dir) == ("dummy", "main", "d")
    assert resolve().model.tokenizer == "vjax-tiny"
    assert 0 <= resolve(seed=None).model.seed < 2**31


def test_values_assigned_later_are_checked_too():
    args = EngineArgs()
    args.block_size = 5
    with pytest.raises(ConfigError, match="block_size=5"):
        args.resolve(arch(), platform="cpu")


FILE = {"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 99, "do_sample": True, "eos_token_id": [5, 6]}


def test_generation_config_of_the_model():
    model = resolve(generation_config=FILE).model
    assert model.default_sampling_params == {"temperature": 0.6, "top_p": 0.9, "max_tokens": 99}
    assert model.generation_eos_token_ids == (5, 6)


def test_eos_of_config_json_where_the_file_names_none():
    assert resolve().model.generation_eos_token_ids == (2,)
    assert resolve(generation_config={"top_k": 3, "eos_token_id": None}).model.generation_eos_token_ids == (2,)
    config = EngineArgs().resolve(arch(eos_token_ids=()), platform="cpu", hf_config={"eos_token_id": 9})
    assert config.model.generation_eos_token_ids == (9,)


def test_generation_config_vllm_and_overrides():
    model = resolve(generation_config=FILE, **{"use_v1": True}).model
    assert model.default_sampling_params
    args = EngineArgs(generation_config="vllm", override_generation_config={"top_k": 4})
    model = args.resolve(arch(), platform="cpu", generation_config=FILE).model
    assert model.default_sampling_params == {"top_k": 4} and model.generation_eos_token_ids == ()


def test_generation_config_of_a_path(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(FILE))
    for path in (tmp_path, tmp_path / "generation_config.json"):
        model = EngineArgs(generation_config=str(path)).resolve(arch(), platform="cpu").model
        assert model.default_sampling_params["temperature"] == 0.6 and model.generation_eos_token_ids == (5, 6)


def test_penalty_of_the_generation_config_is_ignored_with_a_warning(capsys):
    model = resolve(generation_config={"repetition_penalty": 1.0375}).model
    assert model.default_sampling_params == {}
    assert "repetition_penalty=1.0375" in capsys.readouterr().err


def test_bad_generation_configs(tmp_path):
    with pytest.raises(ConfigError, match=r"sets temperature=3 must be .*2\.0") as e:
        resolve(generation_config={"temperature": 3})
    assert 'generation_config="vllm"' in str(e.value)
    with pytest.raises(ConfigError, match="eos_token_id"):
        resolve(generation_config={"eos_token_id": "</s>"})
    args = EngineArgs(generation_config=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be read"):
        args.resolve(arch(), platform="cpu")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        EngineArgs(generation_config=str(tmp_path / "bad.json")).resolve(arch(), platform="cpu")
