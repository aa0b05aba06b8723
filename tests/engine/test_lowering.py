"""Programs that another process lowered are those that this one would lower; on disk they are right or unused."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hlo_checks import cache_copies
from vjax import envs
from vjax.messages import SchedulerOutput
from vjax.models.functional import build_model
from vjax.models.registry import arch_config_from_hf, read_hf_config
from vjax.parallel.sharding import make_mesh
from vjax.runner import executables as executables_module
from vjax.runner import lowered as lowered_module
from vjax.runner import lowered_cache
from vjax.runner.buckets import Buckets
from vjax.runner.executables import Executables
from vjax.runner.exported import StepDescription
from vjax.runner.lowered import LoweredPrograms
from vjax.runner.lowered_cache import LoweredCache, digest_of
from vjax.runner.packing import PackedLayout
from vjax.runner.programs import SampleBucket
from vjax.runner.step import Step, StepGeometry
from vjax.sample.sampler import Variant
from vjax.weights.hub import resolve_model_path
from vjax.weights.loader import load_weights

BLOCK_SIZE, NUM_SEQS = 16, 4
BUCKETS = Buckets.build(max_num_batched_tokens=16, max_num_seqs=NUM_SEQS, platform="cpu")
KEYS = [BUCKETS.mixed[0], BUCKETS.decode[0], SampleBucket(NUM_SEQS, Variant.FULL), "write_rows"]


def make_executables() -> Executables:
    arch = arch_config_from_hf(read_hf_config(resolve_model_path("vjax-tiny")))
    arch = dataclasses.replace(arch, num_layers=1, sliding_windows=arch.sliding_windows[:1])
    mesh = make_mesh()
    geometry = StepGeometry(
        num_blocks=37,
        block_size=BLOCK_SIZE,
        max_num_seqs=NUM_SEQS,
        max_blocks_per_row=4,
        kv_head_dim=arch.head_dim,
        kv_dtype="float32",
        implementation="xla",
    )
    return Executables(Step(build_model(arch, jnp.float32, mesh=mesh), geometry), BUCKETS, mesh, "cpu")


@pytest.fixture(scope="module")
def direct() -> Executables:
    return make_executables()


@pytest.fixture(scope="module")
def description(direct) -> StepDescription:
    return StepDescription.of(direct.step, direct.mesh, "cpu")


def test_models_of_other_special_tokens_have_the_same_programs(direct, description):
    model = direct.step.model
    tuned = dataclasses.replace(model.arch, eos_token_ids=(1, 2, 3), bos_token_id=4, torch_dtype="float16")
    step = dataclasses.replace(direct.step, model=build_model(tuned, jnp.float32, mesh=direct.mesh))
    assert repr(StepDescription.of(step, direct.mesh, "cpu")) == repr(description)


@pytest.fixture(scope="module")
def cache(description, tmp_path_factory) -> LoweredCache:
    return LoweredCache(tmp_path_factory.mktemp("cache") / "not" / "there", repr(description))


@pytest.fixture(scope="module")
def from_worker(description, cache) -> dict:
    """What worker processes make of KEYS; `cache` has it from then on."""
    with LoweredPrograms(description, KEYS, cache) as lowered:
        assert lowered.num_workers >= 1 and lowered.num_cached == 0
        programs = {key: lowered.get(key) for key in KEYS}
    assert all(process._process.returncode is not None for process in lowered._workers)
    assert lowered.seconds > 0 and "lowered by" in lowered.summary()
    return programs


def inputs(executables: Executables) -> tuple:
    """Weights, and KV and rows full of numbers; those are given away."""
    step = executables.step
    leaves = load_weights(step.model, resolve_model_path("vjax-tiny"), mesh=executables.mesh, load_format="dummy")
    rng = np.random.default_rng(0)
    kv = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), step.kv_specs())
    rows = jax.tree.map(lambda s: jnp.asarray(rng.integers(0, 3, s.shape), s.dtype), step.row_specs())
    return leaves, kv, rows


@pytest.mark.parametrize("key", KEYS, ids=lambda key: getattr(key, "name", key))
def test_a_worker_lowers_the_same_program(direct, from_worker, key):
    elsewhere = make_executables()
    assert isinstance(from_worker[key], bytes)
    compiled = elsewhere.compile(key, from_worker.get), direct.compile(key)
    memory = [c.memory_analysis() for c in compiled]
    assert memory[0].alias_size_in_bytes == memory[1].alias_size_in_bytes > 0
    assert cache_copies(compiled[0].as_text(), [direct.step.kv_specs()[0][0].shape]) == []
    results = []
    for program in compiled:
        leaves, kv, rows = inputs(direct)
        if key in (*BUCKETS.mixed, *BUCKETS.decode):
            layout = PackedLayout.for_bucket(key, BLOCK_SIZE)
            step = SchedulerOutput(
                step_id=0,
                rows=[1, 2],
                num_scheduled_tokens=[1, 1],
                token_ids=[5, -1],
                num_sampled=2,
            )
            results.append(program(leaves, kv, rows, layout.pack(step)))
        elif key == "write_rows":
            results.append(program(rows, np.arange(elsewhere.lower(key).args_info[0][1].shape[0], dtype=np.int32) % 3))
        else:
            results.append(program(direct.step.model.head_leaves(leaves), rows))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(rows)), "not donated"
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_what_is_on_disk_needs_no_worker(description, cache, from_worker):
    with LoweredPrograms(description, KEYS, cache) as lowered:
        assert lowered.num_workers == 0 and lowered.num_cached == len(KEYS)
        assert {key: lowered.get(key) for key in KEYS} == from_worker
        assert lowered.get("another") is None


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:40] + b"?" + data[41:], lambda data: b""]
)
def test_a_damaged_file_is_replaced(description, cache, from_worker, monkeypatch, damage):
    name = repr("write_rows")
    path = cache.path(name)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.get(name) is None
    monkeypatch.setattr(lowered_module._Worker, "lower", lambda self, key: from_worker[key])
    with LoweredPrograms(description, KEYS, cache) as lowered:
        assert lowered.num_workers == 1 and lowered.get("write_rows") == from_worker["write_rows"]
    assert cache.get(name) == from_worker["write_rows"]
    assert sorted(path.parent.iterdir()) == sorted(cache.path(repr(key)) for key in KEYS), "something was left behind"


def test_a_name_covers_what_decides_the_program(description, tmp_path, monkeypatch):
    cache = LoweredCache(tmp_path, repr(description))
    name = repr(KEYS[0])
    geometry = dataclasses.replace(description.geometry, num_blocks=38)
    others = {
        cache.path(name),
        cache.path(repr(dataclasses.replace(KEYS[0], num_seqs=3))),
        LoweredCache(tmp_path, repr(dataclasses.replace(description, geometry=geometry))).path(name),
        LoweredCache(tmp_path, repr(dataclasses.replace(description, kv_scales=True))).path(name),
        LoweredCache(tmp_path, repr(dataclasses.replace(description, jax_options=()))).path(name),
    }
    monkeypatch.setattr(lowered_cache, "source_digest", lambda: "another")
    others.add(LoweredCache(tmp_path, repr(description)).path(name))
    monkeypatch.setattr(lowered_cache, "_versions", lambda: "another")
    others.add(LoweredCache(tmp_path, repr(description)).path(name))
    assert len(others) == 7
    assert "device_kind" in repr(description) and "jax_default_matmul_precision" in repr(description)


def test_the_digest_of_sources_sees_every_change(tmp_path):
    digests = set()
    for path, text in [("a.py", "x"), ("b/a.py", "x"), ("a.py", "y"), ("tuned/h200.json", "{}"), ("b/a.py", "xy")]:
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        digests.add(digest_of([tmp_path]))
    (tmp_path / "README.md").write_text("not a source")
    assert len(digests) == 5 and digest_of([tmp_path]) in digests
    (tmp_path / "a.py").rename(tmp_path / "c.py")
    assert digest_of([tmp_path]) not in digests


@pytest.fixture
def warnings_said(monkeypatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(lowered_module.log, "warning", lambda text, *args: said.append(text % args), raising=True)
    return said


def test_workers_that_cannot_start_cost_one_warning(description, monkeypatch, warnings_said):
    monkeypatch.setattr(lowered_module, "_WORKER", "vjax.no_such_module")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    with LoweredPrograms(description, KEYS, None) as lowered:
        assert [lowered.get(key) for key in KEYS] == [None] * len(KEYS)
    (said,) = warnings_said
    assert "no_such_module" in said and "exit status 1" in said
    executables = make_executables()
    executables.compile_all(["write_rows"], exported=lowered.get)
    assert len(executables.ready()) == 1


def test_a_process_that_cannot_be_started_costs_one_warning(description, monkeypatch, warnings_said):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with LoweredPrograms(description, KEYS, None) as lowered:
        assert lowered.num_workers == 0 and [lowered.get(key) for key in KEYS] == [None] * len(KEYS)
    assert len(warnings_said) == 1 and "/no/such/python" in warnings_said[0]


def test_a_worker_refuses_other_sources_and_survives_what_it_cannot_lower(description, monkeypatch, warnings_said):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with LoweredPrograms(description, ["no such program", "write_rows"], None) as lowered:
        assert lowered.get("no such program") is None and lowered.get("write_rows") is not None
    monkeypatch.setattr(lowered_module, "source_digest", lambda: "another")
    with LoweredPrograms(description, ["write_rows"], None) as lowered:
        assert lowered.get("write_rows") is None
    assert len(warnings_said) == 2
    assert "AssertionError: no such program" in warnings_said[0] and "the sources changed" in warnings_said[1]


def test_leaving_early_ends_the_workers(description, monkeypatch, warnings_said):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    with pytest.raises(KeyboardInterrupt), LoweredPrograms(description, KEYS, None) as lowered:
        processes = [worker._process for worker in lowered._workers]
        assert len(processes) == 2 and all(process.poll() is None for process in processes)
        raise KeyboardInterrupt
    assert all(process.returncode is not None for process in processes)
    assert [lowered.get(key) for key in KEYS] == [None] * len(KEYS) and not warnings_said


def test_a_worker_ends_with_its_input():
    """However the engine's process ended."""
    command = [sys.executable, "-P", "-m", lowered_module._WORKER]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, env=envs.without_device())
    assert done.returncode == 0 and done.stdout == b"" and done.stderr == b""


def test_what_cannot_be_used_is_lowered_here(monkeypatch):
    said = set()
    monkeypatch.setattr(executables_module, "warning_once", lambda log, text: said.add(text))
    executables = make_executables()
    executables.compile_all(["write_rows", "write_masked_ids"], exported=lambda key: b"not a program")
    assert len(executables.ready()) == 2
    assert [text for text in said if "cannot be used here" in text] == list(said) != []


def test_workers_take_over_the_options_of_jax(direct, description, from_worker, monkeypatch):
    """The environment, which they inherit, does not know what a program sets in its own process."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    options = dict(description.jax_options)
    assert options["jax_numpy_dtype_promotion"] == jax.config.values["jax_numpy_dtype_promotion"]
    assert not {"jax_platforms", "jax_compilation_cache_dir"} & set(options)
    changed = tuple((options | {"jax_threefry_partitionable": not options["jax_threefry_partitionable"]}).items())
    key = KEYS[2]
    with LoweredPrograms(dataclasses.replace(description, jax_options=changed), [key], None) as lowered:
        text = direct.lower(key, lowered.get(key)).as_text()
    assert text != direct.lower(key, from_worker[key]).as_text()
