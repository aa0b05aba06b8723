"""Where a device's time went: kernels of a profiler trace, by what they are for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Category -> parts of the names of its kernels. The first category that fits is taken, the last takes the rest.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "attention": ("decode_attention", "prefill_attention"),
    "rope and KV write": ("rope_write_kv", "write_kv"),
    "norms": ("add_rms_norm",),
    "matrix products": ("matmul", "gemm", "nvjet", "cutlass", "splitk", "cublas", "sm90_xmma"),
    "truncation": ("truncate",),
    "transfers": ("memcpy", "memset"),
    "other": ("",),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel or transfer on the device; nanoseconds on the trace's clock.

    Attributes:
        launch: The call that launched it; kernels of one graph launch share it. -1: the trace does not say.
    """

    name: str
    start: float
    end: float
    launch: int = -1

    @property
    def category(self) -> str:
        name = self.name.lower()
        return next(category for category, parts in CATEGORIES.items() if any(part in name for part in parts))


@dataclass(frozen=True)
class Usage:
    """How a stretch of a trace was spent, in seconds.

    Attributes:
        span: From the first kernel's start to the last one's end.
        busy: Of it, time in which at least one kernel ran.
        launched: Of it, time from the first start to the last end of the kernels of a launch. Of a graph it includes
            the gaps between its kernels, some of which only tracing makes.
        by_category: Category -> sum of its kernels' durations.
        counts: Category -> number of kernels.
    """

    span: float
    busy: float
    launched: float
    by_category: dict[str, float]
    counts: dict[str, int]

    @property
    def coverage(self) -> float:
        """Share of the span in which a launch was under way."""
        return self.launched / self.span


def read_kernels(folder: Path) -> list[Kernel]:
    """Everything that the GPU ran, in order of its start, of the newest trace that jax.profiler wrote to `folder`.

    Raises:
        FileNotFoundError: There is no trace.
    """
    from jax.profiler import ProfileData

    files = sorted(folder.glob("**/*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"{folder} holds no trace")
    planes = [plane for plane in ProfileData.from_file(str(files[-1])).planes if "GPU" in plane.name]
    events = [
        event for plane in planes for line in plane.lines if line.name.startswith("Stream") for event in line.events
    ]
    kernels = [Kernel(e.name, e.start_ns, e.start_ns + e.duration_ns, _launch(e)) for e in events]
    return sorted(kernels, key=lambda kernel: kernel.start)


def usage(kernels: Sequence[Kernel]) -> Usage:
    """Of kernels in order of their start, at least one."""
    by_category = dict.fromkeys(CATEGORIES, 0.0)
    counts = dict.fromkeys(CATEGORIES, 0)
    for kernel in kernels:
        by_category[kernel.category] += (kernel.end - kernel.start) / 1e9
        counts[kernel.category] += 1
    span = max(kernel.end for kernel in kernels) - kernels[0].start
    busy = _covered((kernel.start, kernel.end) for kernel in kernels)
    return Usage(span / 1e9, busy / 1e9, _covered(_launches(kernels)) / 1e9, by_category, counts)


def _launch(event: Any) -> int:
    return next((int(value) for name, value in event.stats if name == "correlation_id"), -1)


def _launches(kernels: Iterable[Kernel]) -> list[tuple[float, float]]:
    """Start and end of each launch, in order of the start."""
    spans: dict[int, tuple[float, float]] = {}
    for index, kernel in enumerate(kernels):
        launch = kernel.launch if kernel.launch >= 0 else -1 - index
        start, end = spans.get(launch, (kernel.start, kernel.end))
        spans[launch] = (min(start, kernel.start), max(end, kernel.end))
    return sorted(spans.values())


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans, which are in order of their start."""
    covered, reached = 0.0, float("-inf")
    for start, end in spans:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
