"""V0 and V1 under the names and environment variables that vLLM users know."""

from __future__ import annotations

import importlib

import pytest

from vjax import ConfigError

pytestmark = pytest.mark.usefixtures("shared_programs")

SMALL = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 128, "kv_cache_memory_bytes": 8 << 20}


@pytest.fixture(autouse=True)
def no_mode(monkeypatch):
    monkeypatch.delenv("VJAX_USE_V1", raising=False)
    monkeypatch.delenv("VLLM_USE_V1", raising=False)


@pytest.mark.parametrize(
    ("env", "module"),
    [
        ({}, "vjax.v1.engine.llm_engine"),
        ({"VLLM_USE_V1": "1"}, "vjax.v1.engine.llm_engine"),
        ({"VLLM_USE_V1": "0"}, "vjax.engine.llm_engine"),
        ({"VJAX_USE_V1": "1", "VLLM_USE_V1": "0"}, "vjax.v1.engine.llm_engine"),
        ({"VJAX_USE_V1": "0", "VLLM_USE_V1": "1"}, "vjax.engine.llm_engine"),
    ],
)
def test_engine_class_tells_the_mode(env, module, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert importlib.import_module("vjax.engine.llm_engine").LLMEngine.__module__ == module
    assert importlib.import_module("vjax.v1.engine.llm_engine").LLMEngine.__module__ == "vjax.v1.engine.llm_engine"


def test_both_modes_in_one_process(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V1", "0")
    from vjax import LLM as LLM_V0

    monkeypatch.setenv("VLLM_USE_V1", "1")
    from vjax import LLM as LLM_V1

    with LLM_V0("vjax-tiny", **SMALL) as v0, LLM_V1("vjax-tiny", **SMALL) as v1:
        assert v0.llm_engine.config.use_v1 is False
        assert v1.llm_engine.config.use_v1 is True
        assert v0.llm_engine.config.cache.enable_prefix_caching is False
        assert v1.llm_engine.config.cache.enable_prefix_caching is True
        assert v0.llm_engine.config.scheduler.enable_chunked_prefill is False
        assert v1.llm_engine.config.scheduler.async_scheduling is True
        assert v0.generate("import os", use_tqdm=False)[0].outputs[0].token_ids


def test_engine_class_of_each_mode(monkeypatch):
    monkeypatch.setenv("VJAX_USE_V1", "0")
    from vjax import EngineArgs
    from vjax.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(EngineArgs.from_kwargs(model="vjax-tiny", **SMALL))
    assert engine.config.use_v1 is False
    engine.shutdown()


def test_v0_refuses_async_scheduling():
    from vjax import LLM

    with pytest.raises(ConfigError, match="async_scheduling"):
        LLM("vjax-tiny", use_v1=False, async_scheduling=True, **SMALL)
