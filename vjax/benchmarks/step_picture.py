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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    axes: Any = figure.subplots(2, 1, height_ratios=(3, 2))
    first = {name: record["kernels"][name] for name in _FIRST}
    measured = {**first, **record["kernels"], _IDLE: record["step_seconds"] - record["busy_seconds"]}
    shown: set[str] = set()
    for place, (title, parts) in enumerate((("step", measured), ("memory alone", record["least_seconds"]))):
        _stack(axes[0], place, parts, shown)
        axes[0].text(1e3 * sum(parts.values()), place, f"  {1e3 * sum(parts.values()):.2f} ms", va="center", fontsize=9)
        axes[0].text(0, place - 0.42, title, fontsize=9, va="bottom")
    axes[0].set_xlim(0, 1.12e3 * max(sum(measured.values()), sum(record["least_seconds"].values())))
    axes[0].set_yticks([])
    axes[0].invert_yaxis()
    axes[0].set_xlabel("ms a step, sums over kernels", fontsize=9)
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, 1.3), ncols=5, frameon=False, fontsize=8)
    _timeline(axes[1], record, kernels)
    for one in axes:
        one.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(
        f"{record['num_requests']} requests decode: {1e3 * record['step_seconds']:.2f} ms a step, the device works "
        f"{100 * record['coverage']:.1f} % of it (reads reach {record['read_bytes_per_second'] / 1e12:.2f} TB/s)",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def _stack(axes: Any, place: int, parts: dict[str, float], shown: set[str]) -> None:
    left = 0.0
    for name, seconds in parts.items():
        if seconds <= 0:
            continue
        label = None if name in shown else name
        shown.add(name)
        axes.barh(place, 1e3 * seconds, left=1e3 * left, height=0.55, color=_COLOURS[name], label=label, edgecolor="w")
        if seconds > 0.04 * sum(parts.values()):
            axes.text(1e3 * (left + seconds / 2), place, f"{1e3 * seconds:.2f}", ha="center", va="center", fontsize=8)
        left += seconds


def _timeline(axes: Any, record: Record, kernels: Sequence[Kernel]) -> None:
    """The kernels of one step's length, from the middle of the trace."""
    begin = kernels[len(kernels) // 2].start
    stop = begin + 1e9 * record["step_seconds"]
    for kernel in kernels:
        if begin <= kernel.start < stop:
            axes.barh(
                0, (kernel.end - kernel.start) / 1e6, left=(kernel.start - begin) / 1e6, color=_COLOURS[kernel.category]
            )
    axes.set_xlim(0, (stop - begin) / 1e6)
    axes.set_yticks([])
    axes.set_xlabel("ms, kernel by kernel", fontsize=9)
