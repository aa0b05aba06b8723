"""A migration guide from vLLM's V0 to its V1 engine, step by step, with vjax in vLLM's place."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

MODEL = "vjax-tiny"
SMALL = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 128, "kv_cache_memory_bytes": 16 << 20}


@pytest.fixture(autouse=True)
def mode(monkeypatch):
    """The samples set the variable through os.environ; it is unset before and after."""
    for name in ("VLLM_USE_V1", "VJAX_USE_V1"):
        monkeypatch.setenv(name, "")
    return monkeypatch


# ---- Step 1: enable V1 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "mode"), [("1", "V1"), ("0", "V0")])
def test_the_variable_in_a_shell(value, mode):
    command = [sys.executable, "-m", "vjax", "generate", "Hello", "--max-tokens", "2"]
    command += [f"--engine.{name}={number}" for name, number in (SMALL | {"max_num_batched_tokens": 256}).items()]
    environment = os.environ | {"VLLM_USE_V1": value}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f"{mode} mode" in done.stderr, done.stderr


def test_the_variable_in_python():
    os.environ["VLLM_USE_V1"] = "1"

    from vjax import LLM

    llm = LLM(model=MODEL)  # without any other argument
    assert llm.llm_engine.config.use_v1
    assert llm.generate("Hello", use_tqdm=False)[0].outputs[0].token_ids
    llm.shutdown()


# ---- Step 2: verify that V1 is active -----------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "module"), [("1", "vjax.v1.engine.llm_engine"), ("0", "vjax.engine.llm_engine")])
def test_the_engine_type_tells_the_mode(value, module):
    os.environ["VLLM_USE_V1"] = value

    from vjax.engine.llm_engine import LLMEngine

    assert LLMEngine.__module__ == module


def test_the_engine_of_an_llm_has_that_mode():
    from vjax import LLM
    from vjax.engine.llm_engine import LLMEngine

    assert LLMEngine.__module__ == "vjax.v1.engine.llm_engine"
    with LLM(MODEL, **SMALL, use_v1=True) as llm:
        assert llm.llm_engine.config.use_v1


# ---- Step 3: use V1's features ------------------------------------------------------------------------------------


def test_prefix_caching():
    os.environ["VLLM_USE_V1"] = "1"

    from vjax import LLM

    llm = LLM(model=MODEL, enable_prefix_caching=True, **SMALL)
    prefix = "Long context prefix... " * 4
    (first,) = llm.generate(prefix, use_tqdm=False)
    (second,) = llm.generate(prefix + "different continuation", use_tqdm=False)
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == len(first.prompt_token_ids) // 16 * 16 > 0
    llm.shutdown()


# ---- Step 4: compare V0 and V1 ------------------------------------------------------------------------------------


def benchmark_engine(use_v1: bool):
    os.environ["VLLM_USE_V1"] = "1" if use_v1 else "0"

    from vjax import LLM, SamplingParams

    llm = LLM(model=MODEL, **SMALL | {"max_num_batched_tokens": 256})
    prompts = ["Hello world"] * 20

    start = time.time()
    outputs = llm.generate(prompts, SamplingParams(max_tokens=5, temperature=0), use_tqdm=False)
    elapsed = time.time() - start

    llm.shutdown()
    return elapsed, [output.outputs[0].token_ids for output in outputs], llm.llm_engine.config.use_v1


def test_both_modes_give_the_same_greedy_tokens():
    v0_time, v0_ids, v0_mode = benchmark_engine(use_v1=False)
    v1_time, v1_ids, v1_mode = benchmark_engine(use_v1=True)
    assert (v0_mode, v1_mode) == (False, True)
    assert v0_ids == v1_ids and len(v0_ids) == 20
    assert v0_time > 0 and v1_time > 0


# ---- Common patterns ----------------------------------------------------------------------------------------------


def test_pattern_1_gradual_migration():
    os.environ["VLLM_USE_V1"] = "0"
    from vjax import LLM as LLM_V0

    os.environ["VLLM_USE_V1"] = "1"
    from vjax import LLM as LLM_V1

    # The class keeps its mode, whatever the variable says when the object is made.
    chat_llm = LLM_V1(model=MODEL, **SMALL | {"max_num_batched_tokens": 256})
    batch_llm = LLM_V0(model=MODEL, **SMALL | {"max_num_batched_tokens": 256})
    assert [llm.llm_engine.config.use_v1 for llm in (chat_llm, batch_llm)] == [True, False]
    assert [llm.llm_engine.config.scheduler.static_batch for llm in (chat_llm, batch_llm)] == [False, True]
    batch_llm.shutdown()
    assert chat_llm.generate("Hello", use_tqdm=False)[0].finished
    chat_llm.shutdown()


def get_llm_class():
    use_v1 = os.environ.get("VLLM_USE_V1", "0") == "1"

    if use_v1:
        from vjax.v1.engine.llm_engine import LLMEngine as V1Engine

        return V1Engine
    else:
        from vjax.engine.llm_engine import LLMEngine as V0Engine

        return V0Engine


@pytest.mark.parametrize("value", ["1", "0"])
def test_pattern_2_feature_detection(value):
    from vjax import EngineArgs, SamplingParams

    os.environ["VLLM_USE_V1"] = value
    engine = get_llm_class().from_engine_args(EngineArgs(model=MODEL, **SMALL | {"max_num_batched_tokens": 256}))
    assert engine.config.use_v1 is (value == "1")
    engine.add_request("r", "Hello", SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert outputs[-1].finished and len(outputs[-1].outputs[0].token_ids) == 2
    engine.shutdown()


def test_pattern_3_one_system_prompt():
    os.environ["VLLM_USE_V1"] = "1"

    from vjax import LLM, SamplingParams

    llm = LLM(model=MODEL, **SMALL)

    system_prompt = """You are a helpful assistant. Be concise and accurate.
Always cite sources when providing information."""

    conversations = [
        f"{system_prompt}\nUser: What is Python?\nAssistant:",
        f"{system_prompt}\nUser: Explain recursion\nAssistant:",
        f"{system_prompt}\nUser: Write a sorting algorithm\nAssistant:",
    ]

    outputs = llm.generate(conversations, SamplingParams(max_tokens=5), use_tqdm=False)
    shared = 0
    while len({tuple(output.prompt_token_ids[: shared + 1]) for output in outputs}) == 1:
        shared += 1
    assert shared >= 16
    assert [output.num_cached_tokens for output in outputs] == [0, shared // 16 * 16, shared // 16 * 16]
    llm.shutdown()


# ---- Troubleshooting ----------------------------------------------------------------------------------------------


def test_the_version():
    import vjax

    assert vjax.__version__.count(".") == 2


def test_prefix_caching_with_an_explicit_block_size():
    from vjax import LLM

    llm = LLM(model=MODEL, enable_prefix_caching=True, block_size=16, disable_log_stats=False, **SMALL)
    for _ in range(2):
        llm.generate([list(range(100, 140))], use_tqdm=False)
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    assert metrics["vjax:prefix_cache_queries"].value == 80
    assert metrics["vjax:prefix_cache_hits"].value == 32
    llm.shutdown()


def test_parameters_that_went_away_with_v0():
    from vjax import LLM, ConfigError

    with pytest.raises(ConfigError, match=r"scheduler_delay_factor=0\.5 is not supported.*dropped this argument"):
        LLM(model=MODEL, scheduler_delay_factor=0.5)
