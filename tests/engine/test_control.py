"""Sleep, new weights, calls of the runner and profiles, on the bundled model: through LLM, AsyncLLM and a process."""

from __future__ import annotations

import asyncio
import functools
import gc
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vjax.runner.runner
from vjax import (
    LLM,
    AsyncEngineArgs,
    AsyncLLM,
    OutOfMemoryError,
    RequestOutputKind,
    SamplingParams,
    VjaxValidationError,
)
from vjax.errors import EngineAsleepError
from vjax.models.functional import build_model
from vjax.models.registry import arch_config_from_hf, read_hf_config
from vjax.parallel.sharding import make_mesh
from vjax.runner.weights import Weights
from vjax.weights.hub import resolve_model_path
from vjax.weights.loader import load_weights
from vjax.weights.update import ArraySpec, Key

pytestmark = pytest.mark.usefixtures("shared_programs")

#: As in other tests, so that what they compiled is found.
SMALL: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "kv_cache_memory_bytes": 16 << 20,
}
PROMPTS = ["def add(a, b):", "import os", "class Node:\n    def __init__(self, value):\n        self.value"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    with LLM("vjax-tiny", **SMALL, profiler_dir=str(tmp_path_factory.mktemp("profiles"))) as llm:
        yield llm


@pytest.fixture(scope="module")
def original(llm):
    """The engine's own weights, by leaf."""
    return llm.get_weights()


@pytest.fixture(scope="module")
def expected(llm, original):
    """What the engine gives with them."""
    return texts(llm)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Tensors of another checkpoint of the same shapes, by their Hugging Face names, and what an engine that was loaded
    with them gives."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(resolve_model_path("vjax-tiny"), folder)
    (file,) = folder.glob("*.safetensors")
    rng = np.random.default_rng(0)
    tensors = {
        name: (tensor.astype(np.float32) * rng.normal(1, 0.3, tensor.shape)).astype(tensor.dtype)
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    with LLM(folder, **SMALL) as llm:
        return tensors, texts(llm)


@pytest.fixture(autouse=True)
def as_it_was(request):
    """The module's engine is awake, empty and consistent after each test."""
    yield
    if "llm" in request.fixturenames:
        core = request.getfixturevalue("llm").llm_engine._core
        core.scheduler.check_integrity()
        assert not core.is_sleeping() and not core.scheduler.has_unfinished_requests and not core.runner.asleep


def texts(llm) -> list[str]:
    return [output.outputs[0].text for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def weight_bytes(weights) -> int:
    return sum(array.nbytes for array in weights.values())


# ---- sleep ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_frees_memory_and_wake_up_restores_it(llm, original, expected, level):
    runner = llm.llm_engine._core.runner
    awake = live_bytes()
    cache = sum(array.nbytes for array in jax.tree.leaves(runner._kv))
    llm.sleep(level)
    assert llm.is_sleeping() and runner.asleep == {"weights", "kv_cache"}
    # The CPU's memory for weights on the host is that of the deleted arrays.
    assert awake - live_bytes() >= cache + weight_bytes(original)
    with pytest.raises(EngineAsleepError, match="wake_up"):
        llm.generate("import os", GREEDY, use_tqdm=False)
    llm.wake_up()
    assert live_bytes() == awake and not llm.is_sleeping()
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == expected
    assert all(output.num_cached_tokens == 0 for output in outputs)
    for name, leaf in llm.get_weights().items():
        np.testing.assert_array_equal(leaf, original[name])


def test_level_0_keeps_the_cache(llm, expected):
    assert texts(llm) == expected
    llm.sleep(level=0)
    with pytest.raises(EngineAsleepError):
        llm.generate("import os", GREEDY, use_tqdm=False)
    llm.wake_up(tags=["scheduling"])
    assert llm.generate(PROMPTS[2], GREEDY, use_tqdm=False)[0].num_cached_tokens >= 16


def test_parts_wake_up_one_after_the_other(llm, original, expected):
    runner = llm.llm_engine._core.runner
    llm.sleep(1)
    with pytest.raises(EngineAsleepError, match="kv_cache and weights"):
        llm.wake_up(["scheduling"])
    llm.wake_up(["weights"])
    assert runner.asleep == {"kv_cache"} and llm.is_sleeping()
    llm.sleep(2)  # more deeply
    assert runner.asleep == {"weights", "kv_cache"}
    with pytest.raises(EngineAsleepError, match="dropped"):
        llm.get_weights(["norm"])
    llm.wake_up(["kv_cache"])
    assert runner.asleep == {"weights"} and llm.is_sleeping()
    llm.wake_up(["weights"])
    assert not llm.is_sleeping() and texts(llm) == expected
    llm.wake_up()  # of an engine that is awake


def test_a_wake_up_without_memory_can_be_tried_again(llm, expected, monkeypatch):
    runner = llm.llm_engine._core.runner
    allocate = vjax.runner.runner.allocate

    def no_room_for_rows(specs, shardings, what):
        if "rows" in what:
            raise OutOfMemoryError("full")
        return allocate(specs, shardings, what)

    llm.sleep(1)
    with monkeypatch.context() as patch:
        patch.setattr(vjax.runner.runner, "allocate", no_room_for_rows)
        with pytest.raises(OutOfMemoryError):
            llm.wake_up()
    assert llm.is_sleeping() and runner.asleep == {"kv_cache"}
    llm.wake_up()
    assert texts(llm) == expected


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_requests_that_run(llm, mode):
    engine = llm.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, output_kind=RequestOutputKind.CUMULATIVE)
    whole = llm.generate(PROMPTS[:2], params, use_tqdm=False)
    for i in range(2):
        engine.add_request(f"{mode}{i}", PROMPTS[i], params)
    last = {}
    for _ in range(5):
        last |= {output.request_id: output for output in engine.step()}
    begun = {name: len(output.outputs[0].token_ids) for name, output in last.items()}
    assert all(begun.values())
    engine.sleep(level=1, mode=mode)
    engine.add_request("late", PROMPTS[0], params)
    engine.abort_request("nobody")
    with pytest.raises(EngineAsleepError):
        while True:
            last |= {output.request_id: output for output in engine.step()}
    assert "late" not in last
    if mode != "keep":
        assert {output.outputs[0].finish_reason for output in last.values()} == {
            "abort" if mode == "abort" else "length"
        }
    engine.wake_up()
    while engine.has_unfinished_requests():
        last |= {output.request_id: output for output in engine.step()}
    assert last["late"].outputs[0].token_ids == whole[0].outputs[0].token_ids
    for i in range(2):
        ids, full = last[f"{mode}{i}"].outputs[0].token_ids, whole[i].outputs[0].token_ids
        assert ids == (full[: len(ids)] if mode == "abort" else full) and len(ids) >= begun[f"{mode}{i}"]


def test_bad_arguments(llm):
    for level, mode in [(3, "abort"), (True, "abort"), ("1", "abort"), (1, "later")]:
        with pytest.raises(VjaxValidationError, match="must be"):
            llm.sleep(level, mode)
    for tags in ["weights", ["kv"], 1]:
        with pytest.raises(VjaxValidationError, match="weights, kv_cache, scheduling"):
            llm.wake_up(tags)
    assert not llm.is_sleeping()


# ---- weights --------------------------------------------------------------------------------------------------------


def test_update_gives_what_an_engine_with_these_weights_gives(llm, original, expected, other):
    tensors, other_texts = other
    assert texts(llm) == expected != other_texts
    # The first update compiles the packing of tensors, and copies of arrays on the device.
    on_device = {name: jax.numpy.asarray(leaf) for name, leaf in original.items()}
    llm.update_weights(tensors)
    llm.update_weights(on_device)
    assert texts(llm) == expected
    compiled = []

    def count(event: str, duration_secs: float, **_: object) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append((event, duration_secs))

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        before = llm.llm_engine.num_compilations_while_serving
        llm.update_weights(tensors)
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert [output.outputs[0].text for output in outputs] == other_texts
        assert all(output.num_cached_tokens == 0 for output in outputs)
        llm.update_weights(on_device)
        assert texts(llm) == expected
        llm.update_weights(tuple(original.values()))
        assert texts(llm) == expected
        assert compiled == [] and llm.llm_engine.num_compilations_while_serving == before
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def test_arrays_stay_the_callers(llm, original, expected):
    arrays = {name: leaf.copy() for name, leaf in original.items()}
    on_device = jax.numpy.asarray(arrays.pop("norm"))
    llm.update_weights(arrays | {"norm": on_device})
    for array in arrays.values():
        array[:] = 0
    assert texts(llm) == expected
    llm.update_weights(original)
    np.testing.assert_array_equal(on_device, original["norm"])
    weights = llm.get_weights()
    for array in weights.values():
        array[:] = 0
    assert texts(llm) == expected


def test_part_of_the_weights_in_another_dtype(llm, original, expected):
    scaled = original["norm"].astype(np.float32) * 1.5
    with pytest.raises(VjaxValidationError, match="missing"):
        llm.update_weights({"norm": scaled})
    llm.update_weights({"norm": scaled.astype(ml_dtypes.bfloat16)}, partial=True)
    weights = llm.get_weights()
    assert weights["norm"].dtype == original["norm"].dtype
    np.testing.assert_array_equal(
        weights["norm"].astype(np.float32),
        scaled.astype(ml_dtypes.bfloat16).astype(original["norm"].dtype).astype(np.float32),
    )
    assert all(np.array_equal(weights[name], leaf) for name, leaf in original.items() if name != "norm")
    llm.update_weights({"norm": original["norm"]}, partial=True)
    assert texts(llm) == expected


def test_a_bad_update_changes_nothing(llm, original, expected, other):
    name = next(name for name in original if name != "norm")
    bad = original | {"norm": original["norm"][:-1], name: original[name].astype(np.int32), "no.such.leaf": np.ones(2)}
    del bad[list(original)[-1]]
    with pytest.raises(VjaxValidationError) as error:
        llm.update_weights(bad)
    text = str(error.value)
    assert "1 unexpected names:\n  no.such.leaf" in text and f"{name}: int32" in text and "norm: [" in text
    assert f"1 missing:\n  {list(original)[-1]}" in text
    tensors = other[0]
    without_one = {tensor: array for tensor, array in tensors.items() if "0.self_attn.k_proj" not in tensor}
    with pytest.raises(VjaxValidationError, match=r"missing:\n  model\.layers\.0\.self_attn\.k_proj"):
        llm.update_weights(without_one, partial=True)
    with pytest.raises(VjaxValidationError, match=r"given twice:\n  norm, also as model\.norm\.weight"):
        llm.update_weights(original | {"model.norm.weight": original["norm"]})
    for params in [{}, (), 3, {"norm": [1.0]}, {"layers": {"0": original["norm"]}}, tuple(original.values())[1:]]:
        with pytest.raises(VjaxValidationError):
            llm.update_weights(params)
    with pytest.raises(VjaxValidationError, match="no arrays"):
        llm.update_weights({}, partial=True)
    assert not llm.is_sleeping() and texts(llm) == expected


def test_update_while_requests_are_unfinished(llm, original, expected, other):
    engine = llm.llm_engine
    engine.add_request("running", PROMPTS[0], ENDLESS)
    for _ in range(3):
        engine.step()
    with pytest.raises(RuntimeError, match="keep"):
        llm.update_weights(original)
    llm.sleep(level=0, mode="keep")
    llm.update_weights(other[0])
    assert llm.is_sleeping()
    llm.wake_up()
    for _ in range(3):
        engine.step()
    engine.abort_request("running")
    assert texts(llm) == other[1]
    llm.update_weights(original)
    assert texts(llm) == expected


@pytest.mark.parametrize("level", [1, 2])
def test_update_brings_the_weights_of_an_engine_that_sleeps(llm, original, expected, other, level):
    llm.sleep(level)
    with pytest.raises(EngineAsleepError, match="partial"):
        llm.update_weights({"norm": original["norm"]}, partial=True)
    llm.update_weights(other[0])
    assert llm.is_sleeping() and llm.llm_engine._core.runner.asleep == {"kv_cache"}
    llm.wake_up()
    assert texts(llm) == other[1]
    llm.collective_rpc("reload_weights")
    llm.reset_prefix_cache()
    assert texts(llm) == expected


def test_an_update_that_breaks_off_never_leaves_mixed_weights(llm, original, expected):
    class Broken:
        shape, dtype = original["norm"].shape, original["norm"].dtype

        def __array__(self, *_: object, **__: object):
            raise OSError("the array is gone")

    assert next(iter(original)) != "norm"
    with pytest.raises(OSError, match="gone"):
        llm.update_weights(original | {"norm": Broken()})
    assert llm.is_sleeping() and llm.llm_engine._core.runner.asleep == {"weights"}
    llm.wake_up()
    assert texts(llm) == expected


# ---- the rest -------------------------------------------------------------------------------------------------------


def num_leaves(runner, more: int, *, factor: int = 1) -> int:
    return factor * (len(runner.weights.names()) + more)


def unsendable(runner):
    return runner


def test_calls_of_the_runner_and_the_model(llm, original):
    assert llm.collective_rpc("warm_up", args=(0,)) == [None]
    assert llm.collective_rpc(num_leaves, (1,), {"factor": 2}) == [2 * (len(original) + 1)]
    for method in ["no_such_method", "_delete", 3]:
        with pytest.raises(VjaxValidationError, match="method"):
            llm.collective_rpc(method)
    (found,) = llm.apply_model(
        lambda model: sorted(np.asarray(leaf).shape for leaf in jax.tree.leaves(nnx_state(model)))
    )
    assert found == sorted(leaf.shape for leaf in original.values())


def nnx_state(model):
    from flax import nnx

    return nnx.state(model)


def test_prefix_cache_reset_with_requests_running(llm, expected):
    engine = llm.llm_engine
    full = llm.generate(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True), use_tqdm=False)
    engine.add_request("running", PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    for _ in range(20):
        engine.step()
    assert not llm.reset_prefix_cache()
    assert llm.reset_prefix_cache(reset_running_requests=True)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert outputs[-1].outputs[0].token_ids == full[0].outputs[0].token_ids


def test_profile(llm):
    with pytest.raises(RuntimeError, match="start_profile"):
        llm.stop_profile()
    with pytest.raises(VjaxValidationError, match="must be a name"):
        llm.start_profile("../elsewhere")
    llm.start_profile("first")
    with pytest.raises(RuntimeError, match="stop_profile"):
        llm.start_profile()
    llm.generate("import os", SamplingParams(temperature=0.0, max_tokens=2), use_tqdm=False)
    llm.stop_profile()
    folder = llm.llm_engine.config.profiler_dir
    traces = list(Path(folder, "first").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 0


def test_aborts_at_any_moment(llm, expected):
    """Random calls of the engine, aborts among them, leave consistent books and never a wrong token."""
    engine, rng = llm.llm_engine, random.Random(0)
    params = SamplingParams(temperature=0.0, max_tokens=6)
    alone = {p: llm.generate(p, params, use_tqdm=False)[0].outputs[0].token_ids for p in PROMPTS}
    prompts, ended = {}, {}
    for i in range(100):
        action = rng.choice(["add", "add", "step", "step", "step", "abort", "reset", "sleep", "wake"])
        if action == "add":
            prompts[str(i)] = rng.choice(PROMPTS)
            engine.add_request(str(i), prompts[str(i)], params)
        elif action == "abort" and prompts:
            for name in rng.sample(list(prompts), min(2, len(prompts))):
                engine.abort_request(name)
                ended.setdefault(name, None)
        elif action == "reset":
            assert engine.reset_prefix_cache(reset_running_requests=True)
        elif action == "sleep" and rng.random() < 0.3:
            engine.sleep(rng.choice([0, 1]), rng.choice(["abort", "wait", "keep"]))
        elif action == "wake" and engine.is_sleeping():
            engine.wake_up()
        elif action == "step":
            try:
                outputs = engine.step()
            except EngineAsleepError:
                outputs = []
            for output in outputs:
                ended[output.request_id] = output if output.finished else ended.get(output.request_id)
        engine._core.scheduler.check_integrity()
    if engine.is_sleeping():
        engine.wake_up()
    while engine.has_unfinished_requests():
        for output in engine.step():
            ended[output.request_id] = output if output.finished else ended.get(output.request_id)
    assert ended.keys() == prompts.keys()
    for name, output in ended.items():
        if output is not None:
            ids = output.outputs[0].token_ids
            assert ids == alone[prompts[name]][: len(ids)]
            assert output.outputs[0].finish_reason == "abort" or len(ids) == len(alone[prompts[name]])


# ---- AsyncLLM, and the core in a process ----------------------------------------------------------------------------


async def collect(engine, prompt, params, request_id) -> list:
    return [output async for output in engine.generate(prompt, params, request_id)]


async def check_async(engine, original, expected, other, mode: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, output_kind=RequestOutputKind.FINAL_ONLY)
    streamed = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, output_kind=RequestOutputKind.CUMULATIVE)
    running = engine.generate(PROMPTS[0], streamed, "running")
    await anext(running)
    await engine.sleep(1, mode)
    assert await engine.is_sleeping()
    late = asyncio.create_task(collect(engine, PROMPTS[1], params, "late"))
    await asyncio.sleep(0)
    if mode == "keep":
        await engine.abort("running")
    last = [output async for output in running][-1]
    assert last.outputs[0].finish_reason == ("length" if mode == "wait" else "abort")
    assert await engine.is_sleeping() and not late.done()
    await engine.update_weights(other[0])
    await engine.wake_up()
    assert (await late)[-1].outputs[0].text == other[1][1]
    await engine.update_weights(original)
    assert (await collect(engine, PROMPTS[2], params, "again"))[-1].outputs[0].text == expected[2]
    assert await engine.reset_prefix_cache(reset_running_requests=True)
    with pytest.raises(VjaxValidationError, match="missing"):
        await engine.update_weights({"norm": original["norm"]})
    np.testing.assert_array_equal((await engine.get_weights(["norm"]))["norm"], original["norm"])
    assert await engine.collective_rpc(num_leaves, (0,)) == [len(original)]
    with pytest.raises(VjaxValidationError, match="profiler_dir"):
        await engine.start_profile()
    assert not await engine.is_sleeping()


def test_async_engine_in_a_thread(original, expected, other):
    with AsyncLLM.from_engine_args(AsyncEngineArgs(model="vjax-tiny", **SMALL), multiprocess=False) as engine:
        for mode in ["abort", "wait", "keep"]:
            asyncio.run(check_async(engine, original, expected, other, mode))


def test_engine_in_a_process(monkeypatch, original, expected, other):
    monkeypatch.setenv("VJAX_ENABLE_V1_MULTIPROCESSING", "1")
    with LLM("vjax-tiny", **SMALL) as llm:
        engine = llm.llm_engine
        engine.add_request("running", PROMPTS[0], ENDLESS)
        llm.sleep(2, mode="keep")
        with pytest.raises(EngineAsleepError):
            while True:
                engine.step()
        llm.update_weights({name: jax.numpy.asarray(leaf) for name, leaf in original.items()})
        llm.wake_up()
        engine.abort_request("running")
        assert texts(llm) == expected
        llm.update_weights(other[0])
        assert texts(llm) == other[1]
        llm.sleep(1, mode="wait")
        llm.wake_up()
        assert texts(llm) == other[1]
        assert llm.collective_rpc(num_leaves, (0,)) == [len(original)]
        with pytest.raises(VjaxValidationError, match="cannot be sent"):
            llm.apply_model(lambda model: model)
        with pytest.raises(VjaxValidationError, match="result cannot be sent"):
            llm.collective_rpc(unsendable)
        assert texts(llm) == other[1]


def test_scales_of_a_quantised_cache_outlive_the_weights():
    path = resolve_model_path("vjax-tiny")
    arch = arch_config_from_hf(read_hf_config(path))
    shape = (arch.num_layers, arch.num_kv_heads)
    given = {f"vectors.{kind}_scale": np.full(shape, 0.25 + i, "f") for i, kind in enumerate("kv")}
    model, mesh = build_model(arch, jax.numpy.float32, kv_scales=True), make_mesh()
    load = functools.partial(load_weights, model, path, mesh=mesh, given=given)
    weights = Weights(model, load(), mesh, load)
    tensors = {name: 2 * tensor for name, tensor in load_file(path / "model.safetensors").items()}
    norm = weights.host_copy("norm")
    weights.drop()
    specs: dict[Key, ArraySpec] = {name: (tensor.shape, str(tensor.dtype)) for name, tensor in tensors.items()}
    for keys in weights.begin_update(specs, partial=False):
        weights.update({key: tensors[str(key)] for key in keys})
    weights.end_update()
    np.testing.assert_array_equal(weights.host_copy("norm"), 2 * norm)
    for name, scale in given.items():
        np.testing.assert_array_equal(weights.host_copy(name), scale)
    weights.drop()
    weights.restore()
    np.testing.assert_array_equal(weights.host_copy("norm"), norm)
    np.testing.assert_array_equal(weights.host_copy("vectors.v_scale"), given["vectors.v_scale"])
    weights.delete()
