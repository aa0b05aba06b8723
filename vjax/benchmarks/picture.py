"""The picture of `vjax bench compare`, drawn with matplotlib, which the extra `bench` installs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vjax.benchmarks.datasets import Dataset
from vjax.benchmarks.records import Record
from vjax.errors import ConfigError

_COLOURS = {"V0": "#9aa5b1", "V1": "#1f6feb"}
_PANELS: tuple[tuple[str, str, str], ...] = (
    ("output_tokens_per_second", "output tokens per second", ",.0f"),
    ("mean_first_token_latency", "mean seconds to the first token", ".2f"),
)


def check(path: Path) -> None:
    """To be called before the work starts.

    Raises:
        ConfigError: matplotlib is not installed, does not write files of this kind, or the file cannot be written.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as e:
        raise ConfigError("The picture needs matplotlib: pip install 'vjax[bench]'.") from e
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".") not in kinds:
        raise ConfigError(f"{path} must end in one of {', '.join('.' + kind for kind in kinds)}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with path.open("ab"):
            pass
        if is_new:
            path.unlink()
    except OSError as e:
        raise ConfigError(f"{path} cannot be written ({e.strerror}); choose another file.") from e


def draw(records: Sequence[Record], path: Path) -> None:
    """A group of bars per workload, a bar per mode: throughput, and time to the first token.

    Args:
        records: Of `vjax bench compare`, as many of each workload as there are modes.
    """
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(r["mode"] for r in records))
    labels = list(dict.fromkeys(Dataset(**r["dataset"]).label for r in records))
    figure = Figure(figsize=(5.5 + 2.2 * len(labels), 4.6), layout="constrained")
    panels: Any = figure.subplots(1, len(_PANELS))
    for axes, (key, title, form) in zip(panels, _PANELS, strict=True):
        values = {mode: [r[key] for r in records if r["mode"] == mode] for mode in modes}
        _bars(axes, values, labels, title, lambda value, form=form: format(value, form))
    panels[0].legend(loc="upper left", frameon=False)
    figure.suptitle(_caption(records[0]), fontsize=10)
    figure.savefig(path, dpi=150)


def _bars(
    axes: Any, values: dict[str, list[float]], labels: Sequence[str], title: str, show: Callable[[float], str]
) -> None:
    """Bars with their numbers; above those of the second mode also the ratio to the first one's."""
    width = 0.8 / len(values)
    first = next(iter(values.values()))
    for i, (mode, heights) in enumerate(values.items()):
        places = [group + (i - (len(values) - 1) / 2) * width for group in range(len(labels))]
        bars = axes.bar(places, heights, width * 0.94, label=mode, color=_COLOURS[mode])
        ratios = [f"\n{height / base:.2f}x" if i else "" for height, base in zip(heights, first, strict=True)]
        texts = [show(height) + ratio for height, ratio in zip(heights, ratios, strict=True)]
        axes.bar_label(bars, texts, padding=2, fontsize=8)
    axes.set_xticks(range(len(labels)), [label.replace(", ", "\n") for label in labels], fontsize=8)
    axes.set_title(title, fontsize=10)
    # Room for the numbers above the bars and for the legend.
    axes.set_ylim(0, 1.3 * max(height for heights in values.values() for height in heights))
    axes.spines[["top", "right"]].set_visible(False)


def _caption(record: Record) -> str:
    engine = record["engine"]
    return (
        f"vjax {record['versions']['vjax']}: {record['engine_args']['model']}, {engine['dtype']}, "
        f"{record['device']['kind']}, {record['num_requests']} requests at once, "
        f"at most {engine['max_num_seqs']} running"
    )
