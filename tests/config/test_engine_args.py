from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vjax.config import EngineArgs
from vjax.config.engine_args import CHECKS
from vjax.config.vllm_args import IGNORED, ONLY
from vjax.errors import ConfigError


def test_every_field_has_a_check_and_is_no_ignored_name():
    assert list(CHECKS) == [f.name for f in dataclasses.fields(EngineArgs)]
    assert not set(CHECKS) & (IGNORED | set(ONLY)) and not IGNORED & set(ONLY)


def test_defaults_pass_their_own_checks():
    args = EngineArgs()
    assert (args.model, args.dtype, args.block_size, args.gpu_memory_utilization) == ("vjax-tiny", "auto", 16, 0.92)
    assert args.seed == 0 and args.disable_log_stats and args.use_v1 is None


def test_values_are_converted():
    args = EngineArgs(model=Path("/m"), dtype=np.float32, block_size=np.int64(32), max_num_seqs=np.int32(4))  # pyright: ignore
    assert (args.model, args.dtype, args.block_size, args.max_num_seqs) == ("/m", "float32", 32, 4)
    assert type(args.block_size) is int
    assert EngineArgs(dtype=SimpleNamespace(name="bfloat16")).dtype == "bfloat16"  # pyright: ignore


@pytest.mark.parametrize(
    ("kwargs", "texts"),
    [
        ({"block_size": 8}, ["block_size=8", "16, 32, 64, 128"]),
        ({"block_size": True}, ["block_size=True", "16, 32, 64, 128"]),
        ({"dtype": "int8"}, ["dtype='int8'", "bfloat16"]),
        ({"kv_cache_dtype": "fp8_e5m2"}, ["kv_cache_dtype='fp8_e5m2'", "auto, fp8, fp8_e4m3, bfloat16, float16"]),
        ({"gpu_memory_utilization": 0}, ["gpu_memory_utilization=0", "(0, 1]"]),
        ({"gpu_memory_utilization": 1.2}, ["gpu_memory_utilization=1.2", "(0, 1]"]),
        ({"max_model_len": 1}, ["max_model_len=1", "at least 2"]),
        ({"max_model_len": -1}, ["max_model_len=-1", "not supported", "pass a number"]),
        ({"max_model_len": "auto"}, ["max_model_len='auto'", "not supported", "pass a number"]),
        ({"max_num_seqs": 0}, ["max_num_seqs=0", "at least 1"]),
        ({"num_gpu_blocks_override": 1}, ["num_gpu_blocks_override=1", "at least 2"]),
        ({"kv_cache_memory_bytes": 1e9}, ["kv_cache_memory_bytes=1000000000.0", "integer"]),
        ({"scheduling_policy": "lifo"}, ["scheduling_policy='lifo'", "fcfs, priority"]),
        ({"load_format": "pt"}, ["load_format='pt'", "auto, safetensors, orbax, dummy"]),
        ({"enable_prefix_caching": "yes"}, ["enable_prefix_caching='yes'", "true or false"]),
        ({"skip_tokenizer_init": None}, ["skip_tokenizer_init=None", "true or false"]),
        ({"model": ""}, ["model=''", "non-empty"]),
        ({"override_generation_config": [1]}, ["override_generation_config=[1]", "mapping"]),
    ],
)
def test_bad_values_name_value_and_limit(kwargs, texts):
    for build in (EngineArgs, EngineArgs.from_kwargs):
        with pytest.raises(ConfigError) as e:
            build(**kwargs)
        assert all(text in str(e.value) for text in texts), str(e.value)
        assert e.value.parameter == next(iter(kwargs))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("trust_remote_code", True, "only False works"),
        ("tensor_parallel_size", 2, "only 1 works, since an engine runs on one GPU"),
        ("quantization", "awq", "only None works"),
        ("speculative_config", {"method": "ngram"}, "speculative decoding is not supported yet"),
        ("enable_lora", True, "LoRA adapters are not supported yet"),
        ("cpu_offload_gb", 4, "stay on the device"),
        ("rope_scaling", {"rope_type": "yarn"}, "config.json decides"),
        ("num_scheduler_steps", 8, "only 1 works"),
    ],
)
def test_arguments_that_would_change_something_are_refused_by_name(name, value, text):
    with pytest.raises(ConfigError) as e:
        EngineArgs.from_kwargs(**{name: value})
    assert str(e.value).startswith(f"{name}={value!r} is not supported") and text in str(e.value)


def test_every_allowed_value_is_accepted_and_mentioned_once(capsys):
    kwargs = {name: rule.allowed[0] for name, rule in ONLY.items()} | {"enforce_eager": True, "swap_space": 4}
    assert EngineArgs.from_kwargs(max_num_seqs=2, **kwargs) == EngineArgs(max_num_seqs=2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "enforce_eager=True" in err and "trust_remote_code=False" in err


def test_nothing_is_logged_without_ignored_arguments(capsys):
    EngineArgs.from_kwargs(model="m", block_size=32)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("max_seqs", "max_num_seqs"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
        ("tensor_paralel_size", "tensor_parallel_size"),
        ("prefix_caching", "enable_prefix_caching"),
    ],
)
def test_unknown_names_get_the_nearest_valid_one(name, nearest):
    with pytest.raises(ConfigError, match=f"unknown argument '{name}': did you mean {nearest}?"):
        EngineArgs.from_kwargs(**{name: 1})


def test_all_problems_are_reported_together():
    with pytest.raises(ConfigError) as e:
        EngineArgs.from_kwargs(block_size=8, xyzzy=1, tensor_parallel_size=2, max_num_seqs=-1)
    text = str(e.value)
    assert all(name in text for name in ("block_size=8", "'xyzzy'", "tensor_parallel_size=2", "max_num_seqs=-1"))
    assert e.value.parameter is None
