"""KV blocks: who holds which, what becomes of them, and which of them attention reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vjax.outputs import StepRecord
from vjax.plot.canvas import BLUE, GREY, LIGHT_BLUE, LIGHT_GREY, ORANGE, new_figure, swatches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KEPT = "#c9b6d3"


def block_table(
    step: StepRecord, *, block_size: int, title: str = "The block table: which request holds which KV blocks"
) -> Figure:
    """A row per running request, a column per block of its tokens; the number in a cell is the physical block.

    Blocks of several requests, blocks that the prefix cache can find, and all others have a colour each.
    """
    holders = _holders(step)
    width = max((len(r.block_ids) for r in step.requests), default=1)
    figure, (axes,) = new_figure(max(7.5, 2.8 + 0.55 * width), 2.0 + 0.45 * max(len(step.requests), 1))
    for place, request in enumerate(step.requests):
        for column, block in enumerate(request.block_ids):
            cached = block in step.cached_block_ids
            colour = ORANGE if holders[block] > 1 else _KEPT if cached else LIGHT_BLUE
            _box(axes, column, place, colour, str(block))
    axes.set_yticks(
        range(len(step.requests)), [f"{r.request_id}: {r.num_computed_tokens} tokens" for r in step.requests]
    )
    axes.set_xticks(range(width))
    axes.set_xlim(-0.6, width - 0.4)
    axes.set_ylim(len(step.requests) - 0.4, -0.6)
    axes.set_xlabel(f"position in the request, in blocks of {block_size} tokens", fontsize=9)
    axes.set_ylabel("request", fontsize=9)
    colours = {
        "shared": ORANGE,
        "its own, full, in the prefix cache": _KEPT,
        "its own, not in the cache": LIGHT_BLUE,
    }
    swatches(axes, colours, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    figure.suptitle(title, fontsize=10)
    return figure


def block_pool(
    steps: Sequence[StepRecord], *, num_blocks: int, title: str = "The pool: what becomes of each KV block"
) -> Figure:
    """A row per physical block, a column per step.

    Args:
        steps: Of `record_steps`; at least one.
        num_blocks: Blocks that exist, the null block included.
    """
    from matplotlib.colors import ListedColormap

    # In this order: the number in the image is the position here.
    colours = {
        "free, empty": LIGHT_GREY,
        "free, kept by the prefix cache": _KEPT,
        "held by one request": LIGHT_BLUE,
        "held by several": ORANGE,
    }
    image = [[0] * len(steps) for _ in range(1, num_blocks)]
    for column, step in enumerate(steps):
        holders = _holders(step)
        for block in range(1, num_blocks):
            held = min(holders[block], 2)
            image[block - 1][column] = held + 1 if held else int(block in step.cached_block_ids)
    figure, (axes,) = new_figure(min(12, max(7.5, 2 + 0.09 * len(steps))), 1.8 + 0.085 * max(num_blocks, 20))
    axes.imshow(
        image,
        cmap=ListedColormap(list(colours.values())),
        vmin=0,
        vmax=len(colours) - 1,
        aspect="auto",
        interpolation="none",
        extent=(-0.5, len(steps) - 0.5, num_blocks - 0.5, 0.5),
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("physical block", fontsize=9)
    swatches(axes, colours, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    figure.suptitle(title, fontsize=10)
    return figure


def paged_attention(
    step: StepRecord, request_id: str, *, block_size: int, num_blocks: int, title: str | None = None
) -> Figure:
    """What the last token that a request computes in a step attends to: its keys in order above, and below where they
    lie in the pool. The lines are the block table.

    Args:
        step: A record in which the request runs.
        num_blocks: Blocks that exist, the null block included.
    """
    request = next(r for r in step.requests if r.request_id == request_id)
    num_keys = request.num_computed_tokens
    blocks = request.block_ids[: -(-num_keys // block_size)]
    others = {block for r in step.requests if r.request_id != request_id for block in r.block_ids}
    columns = min(num_blocks, 24)
    pool_rows = -(-num_blocks // columns)
    figure, (axes,) = new_figure(10.5, 2.9 + 0.42 * pool_rows)
    # The sequence's blocks are centred over the pool, two units wide, with a gap for the lines.
    wide = min(2.2, columns / len(blocks))
    left, pool_top = (columns - wide * len(blocks)) / 2, 3.4
    for index, block in enumerate(blocks):
        filled = min(block_size, num_keys - index * block_size)
        x, share = left + index * wide, filled / block_size
        row, column = divmod(block, columns)
        axes.plot(
            [x + wide / 2, column + 0.5], [1, pool_top + row + 0.08], color=BLUE, linewidth=1, alpha=0.6, zorder=1
        )
        _rectangle(axes, x, 0, wide - 0.08, 1, "w")
        _rectangle(axes, x, 0, (wide - 0.08) * share, 1, ORANGE)
        text = f"{index * block_size}-{index * block_size + filled - 1}" if filled > 1 else f"{index * block_size}"
        axes.text(x + wide / 2 - 0.04, 0.5, text, ha="center", va="center", fontsize=8 if wide > 1.4 else 6)
    for block in range(num_blocks):
        row, column = divmod(block, columns)
        read = block in blocks
        kept = block in step.cached_block_ids
        colour = ORANGE if read else LIGHT_BLUE if block in others else _KEPT if kept else LIGHT_GREY
        _rectangle(axes, column + 0.04, pool_top + row + 0.06, 0.92, 0.88, colour)
        axes.text(column + 0.5, pool_top + row + 0.5, str(block), ha="center", va="center", fontsize=8, zorder=3)
    axes.text(0, -0.25, f"Token {num_keys - 1} of request {request_id} reads the keys and values of tokens", fontsize=9)
    axes.set_xlim(-0.2, columns + 0.2)
    axes.set_ylim(pool_top + pool_rows + 0.1, -1)
    axes.set_yticks([0.5, pool_top + pool_rows / 2], ["token\npositions", "physical\nblocks"])
    axes.set_xticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    colours = {
        "read": ORANGE,
        "of other running requests": LIGHT_BLUE,
        "free, kept by the prefix cache": _KEPT,
        "free, empty (block 0: padding)": LIGHT_GREY,
    }
    swatches(axes, colours, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4)
    default = f"Paged attention of one token: {num_keys} keys in {len(blocks)} blocks of {block_size} tokens"
    figure.suptitle(title or default, fontsize=10)
    return figure


def _holders(step: StepRecord) -> Counter[int]:
    return Counter(block for request in step.requests for block in request.block_ids)


def _box(axes: Any, column: int, place: int, colour: str, text: str) -> None:
    _rectangle(axes, column - 0.46, place - 0.4, 0.92, 0.8, colour)
    axes.text(column, place, text, ha="center", va="center", fontsize=9)


def _rectangle(axes: Any, x: float, y: float, width: float, height: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=GREY, linewidth=0.5, zorder=2))
