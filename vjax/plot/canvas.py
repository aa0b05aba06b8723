"""Figures and files. matplotlib is imported when the first figure is made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vjax.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, LIGHT_BLUE, ORANGE, GREEN, GREY, LIGHT_GREY = "#1f6feb", "#a8c7fa", "#f2994a", "#5b8e7d", "#9aa5b1", "#edf0f3"
#: Told apart in print and by most of the colour-blind; the order in which things without a colour of their own get one.
SERIES = ("#6ea8fe", ORANGE, GREEN, "#b08fbb", "#d1495b", "#edae49", "#7d8597", "#bcb8b1")


def new_figure(
    width: float,
    height: float,
    rows: int = 1,
    columns: int = 1,
    *,
    ratios: Sequence[float] | None = None,
    **options: Any,
) -> tuple[Figure, list[Any]]:
    """A figure of so many inches, and its axes row by row.

    Args:
        ratios: Heights of the rows, relative to each other.
        options: Of `Figure.subplots`.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ConfigError("The picture needs matplotlib: pip install 'vjax[bench]'.") from e
    figure = Figure(figsize=(width, height), layout="constrained")
    grid: Any = figure.subplots(rows, columns, squeeze=False, height_ratios=ratios, **options)
    axes = list(grid.flat)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=9)
    return figure, axes


def check(path: Path) -> None:
    """To be called before the work whose picture goes to `path`.

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


def save(figure: Figure, path: Path) -> None:
    """Writes a picture in the format that the file's ending names."""
    figure.savefig(path, dpi=150)


def swatches(axes: Any, colours: dict[str, str], **options: Any) -> None:
    """A legend of coloured squares: text -> colour."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, edgecolor=GREY, linewidth=0.5, label=text) for text, colour in colours.items()]
    axes.legend(handles=handles, frameon=False, fontsize=9, **options)
