"""How an engine starts on a GPU, with the CPU in its place: everything is compiled, from what workers lowered."""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from vjax import LLM, SamplingParams
from vjax.engine import builder, heap
from vjax.runner import executables, exported, memory, platform

SMALL: dict[str, Any] = {
    "max_model_len": 64,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 64,
    "num_gpu_blocks_override": 9,
}
PROMPT = {"prompt_token_ids": [5, 6, 7]}
PARAMS = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.fixture
def start_lines(monkeypatch, tmp_path) -> Iterator[list[str]]:
    """Makes the CPU look like a GPU to the builder, with an empty cache; the log's lines on how engines started."""
    lines: list[str] = []
    describe = exported.StepDescription.of
    monkeypatch.setattr(exported.StepDescription, "of", lambda step, mesh, name: describe(step, mesh, "cpu"))
    monkeypatch.setattr(platform, "platform_name", lambda device: "gpu")
    monkeypatch.setattr(platform, "lowered_cache_dir", lambda: tmp_path)
    monkeypatch.setattr(memory, "compile_threads", lambda device: 2)
    # JAX before 0.11, which has no GPU kernels, does not know all of them.
    monkeypatch.setattr(executables, "product_options", lambda rows: {})
    said = logging.Handler()
    said.emit = lambda record: lines.append(record.getMessage())  # pyright: ignore[reportAttributeAccessIssue]
    builder.log.addHandler(said)
    yield lines
    builder.log.removeHandler(said)


def test_everything_is_compiled_before_serving(start_lines):
    with LLM("vjax-tiny", **SMALL) as llm:
        expected = llm.generate(PROMPT, PARAMS, use_tqdm=False)[0].outputs[0].token_ids
        programs = llm.llm_engine._core.runner.executables
        assert len(programs.ready()) == len(programs.all_keys()) == 8
        assert llm.llm_engine.num_compilations_while_serving == 0
    with LLM("vjax-tiny", **SMALL) as llm:
        assert llm.generate(PROMPT, PARAMS, use_tqdm=False)[0].outputs[0].token_ids == expected
    first, second = [line for line in start_lines if line.startswith("start: weights")]
    assert "8 lowered by" in first and "0 on disk" in first and "warm-up" in first
    assert "8 lowered ones on disk" in second
    assert not [line for line in start_lines if "worker process failed" in line]


def test_collections_skip_a_living_engine():
    """A full collection looks at what came after the engine only, and at everything once the engine is gone."""
    gc.unfreeze()
    llm = LLM("vjax-tiny", max_model_len=64)
    assert gc.get_freeze_count() > 10_000
    del llm
    assert gc.get_freeze_count() == 0


def test_an_interrupt_during_the_collection_is_not_lost():
    """What a callback of the collector raises is dropped: JAX's runs at every collection."""

    class Owner:
        pass

    def interrupt(phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            signal.raise_signal(signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    owner = Owner()
    gc.callbacks.append(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            heap.freeze(owner)
    finally:
        gc.callbacks.remove(interrupt)
        signal.signal(signal.SIGINT, handler)
    del owner
    assert gc.get_freeze_count() == 0
