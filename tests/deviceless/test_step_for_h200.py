"""The step of a Llama-3-8B, compiled for the H200 without a GPU: one command buffer, in place, little memory."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from pallas_kernels.implementation import mosaic_unavailable_reason
from tests.deviceless.compile_step import run

MIXED = "mixed[128, 64 sequences]"
STEP = (
    "decode[1]",
    "decode[256]",
    "mixed[8192, 64 sequences]",
    f"opening_{MIXED}",
    MIXED,
    "sample_greedy[8]",
    "sample_full[256]",
)
UPDATES = ("write_rows", "write_masked_ids")


def missing() -> str | None:
    """Why nothing can be compiled for the H200 here, or None."""
    if reason := mosaic_unavailable_reason():
        return reason
    wheels = [name for name in ("jax_cuda13_plugin", "jax_plugins.xla_cuda13") if not _is_installed(name)]
    if wheels:
        return f"compiling for a GPU needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt; not found: {wheels}"
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, Any]:
    """What compile_step.py prints."""
    return run(tmp_path_factory.mktemp("dump"))


@pytest.fixture(scope="module")
def programs(report) -> dict[str, dict[str, Any]]:
    """The programs of a Llama-3-8B by name."""
    programs = {program["name"]: program for program in report["llama_3_8b"]}
    assert set(programs) == {*STEP, *UPDATES}
    return programs


def is_one_command_buffer(program: dict[str, Any]) -> bool:
    return program["thunks"] == ["kCommandBuffer"]


def works_in_place(program: dict[str, Any]) -> bool:
    """Every donated byte is an output's byte too, and nothing copies, converts or transposes a cache."""
    return program["aliased_bytes"] >= program["donated_bytes"] > 0 and program["cache_copies"] == []


def has_small_temporaries(program: dict[str, Any]) -> bool:
    """Less than one cache array, which is half of one layer's cache."""
    return program["temporary_bytes"] < program["cache_array_bytes"]


@pytest.mark.parametrize("name", STEP)
def test_a_program_is_one_command_buffer(programs, name):
    assert is_one_command_buffer(programs[name]), programs[name]


@pytest.mark.parametrize("name", UPDATES)
def test_row_updates_are_a_few_kernels(programs, name):
    """XLA captures only programs of five kernels and more."""
    thunks = programs[name]["thunks"]
    assert is_one_command_buffer(programs[name]) or (len(thunks) < 5 and set(thunks) == {"kCustomKernel"}), thunks


@pytest.mark.parametrize("name", [*STEP, *UPDATES])
def test_a_program_works_in_place(programs, name):
    assert works_in_place(programs[name]), programs[name]
    assert has_small_temporaries(programs[name]), programs[name]


@pytest.mark.parametrize("index", range(2), ids=["decode", "sample"])
def test_what_a_worker_lowers_compiles_to_the_same(report, programs, index):
    program = report["lowered_elsewhere"][index]
    direct = programs[program["name"]]
    assert works_in_place(program), program
    same = ("instructions", "thunks", "aliased_bytes", "temporary_bytes")
    assert {name: program[name] for name in same} == {name: direct[name] for name in same}
    assert sum(direct["instructions"].values()) > 20


def test_temporaries_of_a_decode_step_are_its_activations(programs):
    assert programs["decode[256]"]["temporary_bytes"] < 64 << 20


def test_the_residual_is_added_in_products_of_many_tokens(programs):
    """Both of the first layer, and the last one of the last layer."""
    assert programs["mixed[8192, 64 sequences]"]["additions_in_products"] == 3


def test_multi_head_attention(report):
    """The Llama-2-7B shape: as many key/value heads as query heads."""
    (decode,) = report["llama_2_7b"]
    assert is_one_command_buffer(decode) and works_in_place(decode) and has_small_temporaries(decode), decode


@pytest.mark.parametrize("index", [0, 1], ids=["decode", "mixed"])
def test_fp8_cache(report, index):
    program = report["fp8"][index]
    assert is_one_command_buffer(program) and works_in_place(program) and has_small_temporaries(program), program


def test_planted_copies_are_found(report):
    planted = report["planted"]["keeps_and_casts_cache"]
    assert not works_in_place(planted)
    assert {kind for line in planted["cache_copies"] for kind in ("copy", "convert") if f" {kind}(" in line} == {
        "copy",
        "convert",
    }


def test_a_planted_temporary_is_found(report):
    planted = report["planted"]["has_temporary_and_loop"]
    assert not has_small_temporaries(planted), planted


def test_a_planted_loop_is_found(report):
    planted = report["planted"]["has_temporary_and_loop"]
    assert not is_one_command_buffer(planted) and "kWhile" in planted["thunks"], planted


def test_a_lost_donation_is_found(report):
    planted = report["planted"]["does_not_donate"]
    assert not works_in_place(planted) and planted["aliased_bytes"] == 0 and planted["cache_copies"], planted


def test_kernels_are_compiled_once_and_before_their_program(report):
    counts = report["kernels_first"]
    assert counts["found"] == counts["ahead"] >= 6
    assert counts["with_the_program"] == 0
