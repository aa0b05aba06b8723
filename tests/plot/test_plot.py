"""Each picture has axes with names, a title, and the numbers that it was given."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vjax import plot
from vjax.errors import ConfigError
from vjax.outputs import RequestStep, StepRecord

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

FIRST = RequestStep(
    "a", num_prompt_tokens=40, num_tokens=40, num_computed_tokens=40, num_cached_tokens=0, block_ids=(1, 2, 3)
)
DECODE = RequestStep(
    "a", num_prompt_tokens=40, num_tokens=1, num_computed_tokens=41, num_cached_tokens=0, block_ids=(1, 2, 3)
)
SECOND = RequestStep(
    "b", num_prompt_tokens=36, num_tokens=4, num_computed_tokens=36, num_cached_tokens=32, block_ids=(1, 2, 5)
)
STEPS = [
    StepRecord(7, (FIRST,), num_waiting=1, cached_block_ids=frozenset({1, 2})),
    StepRecord(8, (DECODE, SECOND), num_waiting=0, cached_block_ids=frozenset({1, 2, 6})),
]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def check(figure: Figure, path: Path) -> Figure:
    plot.save(figure, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert figure.get_suptitle()
    last = figure.axes[-1]
    assert any([last.get_xlabel(), last.get_ylabel(), *(tick.get_text() for tick in last.get_yticklabels())])
    return figure


def test_counts():
    assert STEPS[0].counts() == {"prefill_tokens": 40, "decode_tokens": 0, "running": 1, "waiting": 1}
    assert STEPS[1].counts() == {"prefill_tokens": 4, "decode_tokens": 1, "running": 2, "waiting": 0}


def test_schedule(tmp_path):
    figure = check(plot.schedule(STEPS), tmp_path / "x.png")
    assert texts(figure) == ["40", "1", "4"]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["a: 40 in, 0 cached", "b: 36 in, 32 cached"]
    assert not texts(plot.schedule(STEPS * 40))


def test_step_load(tmp_path):
    runs = {"one": [s.counts() for s in STEPS], "two": [s.counts() for s in STEPS[:1]]}
    figure = check(plot.step_load(runs), tmp_path / "x.png")
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["one: 2 steps", "two: 1 steps"]
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0, 1, 40, 4]


def test_block_table(tmp_path):
    figure = check(plot.block_table(STEPS[1], block_size=16), tmp_path / "x.png")
    assert texts(figure) == ["1", "2", "3", "1", "2", "5"]
    colours = [patch.get_facecolor() for patch in figure.axes[0].patches]
    assert colours[0] == colours[1] == colours[3] == colours[4] != colours[2] == colours[5]


def test_block_pool(tmp_path):
    figure = check(plot.block_pool(STEPS, num_blocks=8), tmp_path / "x.png")
    # Rows are blocks 1 to 7: 0 empty, 1 kept by the cache, 2 held, 3 shared.
    assert figure.axes[0].images[0].get_array().tolist() == [[2, 3], [2, 3], [2, 2], [0, 0], [0, 2], [0, 1], [0, 0]]


def test_paged_attention(tmp_path):
    figure = check(plot.paged_attention(STEPS[1], "b", block_size=16, num_blocks=8), tmp_path / "x.png")
    assert "36 keys in 3 blocks of 16 tokens" in figure.get_suptitle()
    assert texts(figure)[:3] == ["0-15", "16-31", "32-35"]
    assert "Token 35 of request b reads the keys and values of tokens" in texts(figure)


def test_bars(tmp_path):
    figure = check(
        plot.mode_bars({"tokens/s": {"V0": [10.0, 8.0], "V1": [30.0, 4.0]}}, ["a, b", "c"], title="t"),
        tmp_path / "x.png",
    )
    assert texts(figure) == ["10", "8", "30\n3.00x", "4\n0.50x"]
    figure = check(plot.phases({"x": {"a": 1.0, "b": 0.0}}, xlabel="seconds", title="t"), tmp_path / "x.png")
    assert texts(figure) == ["1.00", "  1.00"]
    figure = check(plot.prefix_cache(["x", "y"], [0, 32], [40, 8], [0.5, 0.1], title="t"), tmp_path / "x.png")
    assert texts(figure)[:3] == ["40", "32", "8"]
    figure = check(plot.latencies([0.1, 0.2], {"50": 0.15}, title="t"), tmp_path / "x.png")
    assert figure.axes[0].lines[0].get_ydata().tolist() == [100, 200]


def test_files_are_checked_first(tmp_path, monkeypatch):
    plot.check(tmp_path / "new" / "x.svg")
    assert not (tmp_path / "new" / "x.svg").exists()
    with pytest.raises(ConfigError, match=r"must end in one of .*\.png"):
        plot.check(tmp_path / "x.doc")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="needs matplotlib"):
        plot.schedule(STEPS)
