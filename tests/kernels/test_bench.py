"""Tuned configs, and the command line's checks on the CPU."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import __main__ as command_line
from pallas_kernels import tuning
from pallas_kernels.bench import cases, commands
from pallas_kernels.kv_write import reference
from tests.kernels.cases import needs_mosaic


@dataclasses.dataclass(frozen=True)
class Config:
    tile: int = 1
    registers: tuple[int, int] = (232, 40)


EXACT = {"head_dim": 128, "dtype": "bfloat16"}


def find(folder, sizes, exact=EXACT, kind: str | None = "NVIDIA H200"):
    return tuning.lookup("op", Config, exact, sizes, lambda: Config(tile=99), kind=kind, folder=folder)


@pytest.fixture
def folder(tmp_path):
    for tokens, tile in ((1, 2), (64, 3), (1024, 4)):
        config = dataclasses.asdict(Config(tile, (tile, 8)))
        entry = tuning.Entry(EXACT, {"tokens": tokens, "keys": 1024}, config, 1.5)
        tuning.record("op", entry, kind="NVIDIA H200", folder=tmp_path)
    return tmp_path


def test_nearest_case_wins(folder):
    assert find(folder, {"tokens": 64, "keys": 1024}) == Config(3, (3, 8))
    assert find(folder, {"tokens": 100, "keys": 2048}) == Config(3, (3, 8))
    assert find(folder, {"tokens": 300, "keys": 1024}) == Config(4, (4, 8))
    assert find(folder, {"tokens": 0, "keys": 1024}) == Config(2, (2, 8))


def test_heuristic_where_nothing_is_near(folder):
    far = [
        find(folder, {"tokens": 64, "keys": 1 << 20}),
        find(folder, {"tokens": 64}),
        find(folder, {"tokens": 64, "keys": 1024}, exact={**EXACT, "head_dim": 64}),
        find(folder, {"tokens": 64, "keys": 1024}, kind="NVIDIA H100 80GB HBM3"),
        find(folder, {"tokens": 64, "keys": 1024}, kind=None),
    ]
    assert far == [Config(tile=99)] * 5


def test_recording_replaces_and_keeps(folder):
    entry = tuning.Entry(EXACT, {"tokens": 64, "keys": 1024}, {"tile": 7}, 1.0)
    path = tuning.record("op", entry, kind="NVIDIA H200", folder=folder)
    assert path.name == "nvidia_h200.json"
    assert find(folder, {"tokens": 64, "keys": 1024}) == Config(7)
    assert find(folder, {"tokens": 1, "keys": 1024}) == Config(2, (2, 8))
    stored = json.loads(path.read_text())
    assert stored["device_kind"] == "NVIDIA H200" and len(stored["kernels"]["op"]) == 3


def test_config_of_another_version(folder):
    entry = tuning.Entry(EXACT, {"tokens": 64, "keys": 1024}, {"depth": 7}, 1.0)
    tuning.record("op", entry, kind="NVIDIA H200", folder=folder)
    with pytest.raises(ValueError, match=r"Config has fields \['depth'\]"):
        find(folder, {"tokens": 64, "keys": 1024})


@needs_mosaic
def test_shipped_files_fit_their_kernels():
    known = {(case.kernel, type(case.candidates[0])) for op in commands.OPS.values() for case in op.tuned()}
    classes = dict(known)
    for path in tuning.FOLDER.glob("*.json"):
        for kernel, entries in json.loads(path.read_text())["kernels"].items():
            for entry in entries:
                tuning.from_dict(classes[kernel], entry["config"])


def test_relative_error():
    wanted = np.array([[1.0, -4.0], [0.5, 0.1]])
    assert cases.relative_error(wanted, wanted) == 0
    assert cases.relative_error(wanted + [[0, 0], [0.05, 0]], wanted) == pytest.approx(0.1)
    assert cases.relative_error(wanted * np.nan, wanted) == float("inf")


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("write_kv", "8x128, 67"),
        ("rope_write_kv", "qwen3_8b norms"),
        ("add_rms_norm", "2048, 67"),
        ("truncate_logits", "x 1000"),
        ("decode", "8/1x128, block 16"),
    ],
)
def test_check_passes(capsys, op: str, case: str):
    assert command_line.main(["check", op, "--case", case, "--implementation", "xla"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(line.endswith("ok") for line in lines)


def test_check_fails_when_the_op_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr("pallas_kernels.bench.kv.write_kv", lambda k_cache, v_cache, *_, **__: (k_cache, v_cache))
    assert command_line.main(["check", "write_kv", "--case", "8x128, 67", "--implementation", "xla"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_check_reports_what_cannot_run(capsys):
    arguments = ["check", "write_kv", "--case", "8x128, 1 ", "--implementation", "mosaic_gpu"]
    assert command_line.main(arguments) == 1
    assert "Error" in capsys.readouterr().out


def test_timing_without_a_gpu(monkeypatch):
    """The chained and the plain path run; figures are wall times then."""
    from pallas_kernels.bench import timing

    assert not timing.cupti_available()
    timed = cases.Timed(
        "tiny",
        {"xla": lambda state, k: ((state[0] + k, state[1]), k)},
        lambda seed: (jnp.ones(4),),
        read_bytes=16,
        bytes_moved=32,
        state=lambda: (jnp.zeros(4), jnp.zeros(4)),
    )
    seconds = commands._time(timed, timed.columns["xla"])
    ceilings = timing.Ceilings(1e12, 2e12, 3e14)
    assert seconds > 0
    assert commands._figure(timed, 16e-12, ceilings) == "0.00 us, 2 TB/s (100% of copy)"
    assert commands._figure(timed, "OSError: no", ceilings) == "OSError: no"
    assert timing.rotations(1 << 40) == 1 and timing.rotations(16 << 20) == 8 == timing.rotations(1)


def test_tune_stores_the_fastest_that_runs(monkeypatch, tmp_path):
    def timed(config: Config) -> list[cases.Timed]:
        def multiply(x):
            if config.tile == 3:
                raise ValueError("does not fit")
            for _ in range(40 if config.tile == 2 else 1):
                x = jnp.tanh(x @ x)
            return x

        return [
            cases.Timed("tiny", {"config": multiply}, lambda seed, n=n: (jnp.ones((n, n)),), read_bytes=1 << 18)
            for n in (256, 128)
        ]

    case = cases.Tuned("op", EXACT, {"tokens": 64}, [Config(2), Config(1), Config(3), Config(2)], timed)
    monkeypatch.setattr(tuning, "device_kind", lambda: "Any GPU")
    monkeypatch.setattr(tuning, "record", functools.partial(tuning.record, folder=tmp_path))
    lines: list[str] = []
    commands.tune(cases.Op("op", list, lambda: [case], list), "", lines.append)
    assert find(tmp_path, {"tokens": 64}, kind="Any GPU") == Config(1)
    assert len(lines) == 4 and "does not fit" in lines[2] and "best" in lines[3]


def test_rope_check_sees_a_wrong_rotation(monkeypatch):
    right = reference.rope_write_kv

    def wrong(q, k, v, cos, sin, *rest, **norms):
        return right(q, k, v, cos, -sin, *rest, **norms)

    monkeypatch.setattr(reference, "rope_write_kv", wrong)
    assert command_line.main(["check", "rope_write_kv", "--case", "llama3_1b, 1 ", "--implementation", "xla"]) == 1


def test_the_kind_is_that_of_the_device_that_is_lowered_for():
    assert tuning.device_kind() is None
    axis = (jax.sharding.AxisType.Auto,)
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), axis, abstract_device=device)):
        assert tuning.device_kind() == "NVIDIA H200"
