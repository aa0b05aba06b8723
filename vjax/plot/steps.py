"""Steps: who got how many tokens, and how full the batch was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vjax.outputs import StepRecord
from vjax.plot.canvas import BLUE, GREY, LIGHT_BLUE, LIGHT_GREY, ORANGE, new_figure, swatches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: More steps than that, and the numbers in the cells of `schedule` are left out: they would overlap.
_NUMBERED_STEPS = 48


def schedule(
    steps: Sequence[StepRecord], *, title: str = "The schedule: tokens that each request computes in each step"
) -> Figure:
    """A row per request, a column per step; the number in a cell is what the request computes in that step.

    Args:
        steps: Of `record_steps`; at least one.
    """
    requests = {r.request_id: r for step in reversed(steps) for r in step.requests}
    names = list(dict.fromkeys(r.request_id for step in steps for r in step.requests))
    figure, (axes,) = new_figure(min(14, 3.6 + 0.34 * max(len(steps), 14)), 1.9 + 0.42 * len(names))
    numbered = len(steps) <= _NUMBERED_STEPS
    for column, step in enumerate(steps):
        for request in step.requests:
            place, n = names.index(request.request_id), request.num_tokens
            prefill = request.num_prefill_tokens > 0
            colour = LIGHT_GREY if not n else LIGHT_BLUE if prefill else ORANGE
            _cell(axes, column, place, colour, str(n) if n and numbered else "")
    axes.set_yticks(
        range(len(names)),
        [f"{name}: {requests[name].num_prompt_tokens} in, {requests[name].num_cached_tokens} cached" for name in names],
    )
    axes.set_xlim(-0.6, len(steps) - 0.4)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("request", fontsize=9)
    colours = {"prompt tokens": LIGHT_BLUE, "a token of the output": ORANGE, "running, computes nothing": LIGHT_GREY}
    swatches(axes, colours, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    figure.suptitle(title, fontsize=10)
    return figure


def step_load(
    runs: Mapping[str, Sequence[Mapping[str, int]]], *, title: str = "How full the steps are: tokens and requests"
) -> Figure:
    """For each run, tokens per step above, running and waiting requests per step below; all runs on the same scales.

    Args:
        runs: Name -> the `StepRecord.counts` of its steps.
    """
    figure, axes = new_figure(max(7.5, 5.2 * len(runs)), 5, rows=2, columns=len(runs), sharex=True, sharey="row")
    for column, (name, counts) in enumerate(runs.items()):
        tokens, requests = axes[column], axes[len(runs) + column]
        steps = range(len(counts))
        decode, prefill = ([step[key] for step in counts] for key in ("decode_tokens", "prefill_tokens"))
        tokens.bar(steps, decode, width=1.0, color=ORANGE)
        tokens.bar(steps, prefill, bottom=decode, width=1.0, color=LIGHT_BLUE)
        tokens.set_title(f"{name}: {len(counts)} steps", fontsize=10, loc="left")
        for key, colour in (("running", BLUE), ("waiting", GREY)):
            requests.step(steps, [step[key] for step in counts], where="mid", color=colour, label=key)
        requests.set_xlabel("step", fontsize=9)
        requests.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("tokens", fontsize=9)
    axes[len(runs)].set_ylabel("requests", fontsize=9)
    axes[len(runs)].set_ylim(bottom=0)
    axes[len(runs)].legend(frameon=False, fontsize=9)
    swatches(axes[len(runs) - 1], {"prompt tokens": LIGHT_BLUE, "output tokens": ORANGE}, loc="upper right")
    figure.suptitle(title, fontsize=10)
    return figure


def _cell(axes: Any, column: int, place: int, colour: str, text: str) -> None:
    axes.barh(place, 1, left=column - 0.5, height=0.82, color=colour, edgecolor="w", linewidth=0.6)
    if text:
        axes.text(column, place, text, ha="center", va="center", fontsize=8)
