"""The picture of one decode step: its time by kind of kernel, what reading memory takes, and kernel by kernel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vjax.benchmarks.records import Record
from vjax.benchmarks.trace import CATEGORIES, Kernel

_IDLE = "idle"
#: In the order of what memory takes, for the eye to compare.
_FIRST = ("matrix products", "attention")
_COLOURS = dict(
    zip(
        [*CATEGORIES, _IDLE, "weights", "KV cache"],
        ("#d1495b", "#8d5a97", "#edae49", "#1f6feb", "#5b8e7d", "#7d8597", "#bcb8b1", "#f1f1f1", "#1f6feb", "#d1495b"),
        strict=True,
    )
)


def draw(record: Record, kernels: Sequence[Kernel], path: Path) -> None:
    """Bars above, the kernels of the length of one step below.

    Args:
        record: Of `profile.profile`.
        kernels: In order of their start, as many steps as the record says.
    """
    from vjax import plot
    from vjax.plot.bars import stacked_rows
    from vjax.plot.canvas import new_figure

    figure, axes = new_figure(11, 5.2, rows=2, ratios=(3, 2))
    first = {name: record["kernels"][name] for name in _FIRST}
    measured = {**first, **record["kernels"], _IDLE: max(0.0, record["step_seconds"] - record["busy_seconds"])}
    rows = {"step": measured, "memory\nalone": record["least_seconds"]}
    in_ms = {title: {name: 1e3 * seconds for name, seconds in parts.items()} for title, parts in rows.items()}
    stacked_rows(axes[0], in_ms, form=".2f", unit=" ms", colours=_COLOURS)
    axes[0].set_xlabel("ms a step, sums over kernels", fontsize=9)
    _timeline(axes[1], record, kernels)
    axes[1].spines["left"].set_visible(False)
    figure.suptitle(
        f"A decode step at batch {record['num_requests']}: {1e3 * record['step_seconds']:.2f} ms, kernels take "
        f"{100 * record['coverage']:.1f} % of it (reads reach {record['read_bytes_per_second'] / 1e12:.2f} TB/s)",
        fontsize=10,
    )
    plot.save(figure, path)


def _timeline(axes: Any, record: Record, kernels: Sequence[Kernel]) -> None:
    """The kernels of one step's length, from the middle of the trace."""
    begin = kernels[len(kernels) // 2].start
    stop = begin + 1e9 * record["traced_step_seconds"]
    for kernel in kernels:
        if begin <= kernel.start < stop:
            axes.barh(
                0, (kernel.end - kernel.start) / 1e6, left=(kernel.start - begin) / 1e6, color=_COLOURS[kernel.category]
            )
    axes.set_xlim(0, (stop - begin) / 1e6)
    axes.set_yticks([])
    axes.set_xlabel("ms, kernel by kernel", fontsize=9)
