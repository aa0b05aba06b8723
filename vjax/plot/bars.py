"""Bars of measurements: modes side by side, parts of a whole, prefix caching, and the spread of latencies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vjax.plot.canvas import BLUE, GREY, LIGHT_BLUE, ORANGE, SERIES, new_figure, swatches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MODES = {"V0": GREY, "V1": BLUE}


def mode_bars(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    labels: Sequence[str],
    *,
    title: str,
    forms: Sequence[str] | None = None,
) -> Figure:
    """A panel per quantity, a group of bars per workload, a bar per mode.

    Bars after a group's first one also show their ratio to it.

    Args:
        panels: What is measured, with its unit -> mode ("V0", "V1") -> a value per label.
        labels: The workloads.
        forms: A format of the numbers per panel; ".3g" by default.
    """
    figure, axes = new_figure(max(6.5, 2.6 + 1.35 * len(labels) * len(panels)), 4.4, columns=len(panels))
    for one, (name, values), form in zip(axes, panels.items(), forms or [".3g"] * len(panels), strict=True):
        width = 0.8 / len(values)
        first = next(iter(values.values()))
        for i, (mode, heights) in enumerate(values.items()):
            places = [group + (i - (len(values) - 1) / 2) * width for group in range(len(labels))]
            colour = _MODES.get(mode, SERIES[i % len(SERIES)])
            bars = one.bar(places, heights, width * 0.94, label=mode, color=colour)
            ratios = [f"\n{h / base:.2f}x" if i and base else "" for h, base in zip(heights, first, strict=True)]
            texts = [format(height, form) + ratio for height, ratio in zip(heights, ratios, strict=True)]
            one.bar_label(bars, texts, padding=2, fontsize=8)
        one.set_xticks(range(len(labels)), [label.replace(", ", "\n") for label in labels])
        one.set_xlim(-0.6, len(labels) - 0.4)
        one.set_ylabel(name, fontsize=9)
        # Room for the numbers above the bars.
        one.set_ylim(0, 1.25 * max(height for heights in values.values() for height in heights) or 1)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", frameon=False, fontsize=9, ncols=len(names))
    figure.suptitle(title, fontsize=10)
    return figure


def phases(rows: Mapping[str, Mapping[str, float]], *, xlabel: str, title: str, form: str = ".2f") -> Figure:
    """A horizontal bar per row, made of its parts in their order.

    Args:
        rows: Name -> part -> size in the unit that `xlabel` names.
        form: Format of the numbers.
    """
    figure, (axes,) = new_figure(9, 1.7 + 0.55 * len(rows))
    stacked_rows(axes, rows, form=form)
    axes.set_xlabel(xlabel, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def stacked_rows(
    axes: Any,
    rows: Mapping[str, Mapping[str, float]],
    *,
    form: str,
    unit: str = "",
    colours: Mapping[str, str] | None = None,
) -> None:
    """The bars of `phases` on given axes, with a legend above them; parts without length are left out."""
    parts = [part for row in rows.values() for part, size in row.items() if size > 0]
    colours = colours or dict(zip(dict.fromkeys(parts), SERIES, strict=False))
    longest = max(sum(row.values()) for row in rows.values())
    for place, row in enumerate(rows.values()):
        left = 0.0
        for part, size in row.items():
            if size <= 0:
                continue
            axes.barh(place, size, left=left, height=0.6, color=colours[part], edgecolor="w")
            if size > 0.06 * longest:
                axes.text(left + size / 2, place, format(size, form), ha="center", va="center", fontsize=8)
            left += size
        axes.text(left, place, f"  {left:{form}}{unit}", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * longest)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    shown = {part: colours[part] for part in dict.fromkeys(parts)}
    swatches(axes, shown, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(5, len(shown)))


def prefix_cache(
    labels: Sequence[str],
    cached_tokens: Sequence[int],
    computed_tokens: Sequence[int],
    seconds: Sequence[float],
    *,
    title: str,
    seconds_label: str = "seconds to the first token",
) -> Figure:
    """Left, the prompt tokens of each request or run, cached and computed; right, the time that it took.

    Args:
        labels: One per bar, as all the others.
    """
    figure, (left, right) = new_figure(9.5, 1.8 + 0.42 * len(labels), columns=2, sharey=True)
    places = range(len(labels))
    left.barh(places, cached_tokens, color=ORANGE)
    left.barh(places, computed_tokens, left=cached_tokens, color=LIGHT_BLUE)
    longest = max(a + b for a, b in zip(cached_tokens, computed_tokens, strict=True))
    for place, cached, computed in zip(places, cached_tokens, computed_tokens, strict=True):
        for begin, size in ((0, cached), (cached, computed)):
            if size > 0.06 * longest:
                left.text(begin + size / 2, place, f"{size:,}", ha="center", va="center", fontsize=8)
    left.set_yticks(places, labels)
    left.invert_yaxis()
    left.set_xlabel("prompt tokens", fontsize=9)
    for axes in (left, right):  # fewer numbers, or those of the two panels touch
        axes.locator_params(axis="x", nbins=5)
    colours = {"from the prefix cache": ORANGE, "computed": LIGHT_BLUE}
    swatches(left, colours, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    bars = right.barh(places, seconds, color=BLUE)
    right.bar_label(bars, [f" {value:.3g}" for value in seconds], fontsize=8)
    right.set_xlim(0, 1.15 * max(seconds))
    right.set_xlabel(seconds_label, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def latencies(seconds: Sequence[float], percentiles: Mapping[str, float], *, title: str) -> Figure:
    """Seconds of each batch in the order in which they ran, and some percentiles as lines.

    Args:
        percentiles: "50" -> seconds, as in the records of `vjax bench latency`.
    """
    figure, (axes,) = new_figure(8, 3.8)
    axes.plot(range(1, len(seconds) + 1), [1e3 * value for value in seconds], "o", color=BLUE, markersize=4)
    for (name, value), style in zip(percentiles.items(), ("-", "--", ":"), strict=False):
        axes.axhline(1e3 * value, color=ORANGE, linestyle=style, label=f"p{name}: {1e3 * value:.4g} ms")
    axes.set_xlabel("batch, in the order of measurement", fontsize=9)
    axes.set_ylabel("ms from the prompts to the last token", fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(0, 1.2e3 * max(seconds))
    axes.legend(loc="lower right", fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure
