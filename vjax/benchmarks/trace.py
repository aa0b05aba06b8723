"""Where a device's time went: kernels of a profiler trace, by what they are for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Category -> parts of the names of its kernels. The first category that fits is taken, the last takes the rest.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "attention": ("decode_attention", "prefill_attention"),
    "rope and KV write": ("rope_write_kv", "write_kv"),
    "norms": ("add_rms_norm",),
    "matrix products": ("gemm", "nvjet", "cutlass", "splitk", "cublas", "sm90_xmma"),
    "truncation": ("truncate",),
    "transfers": ("memcpy", "memset"),
    "other": ("",),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel or transfer on the device; nanoseconds on the trace's clock."""

    name: str
    start: float
    end: float

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
        by_category: Category -> sum of its kernels' durations.
        counts: Category -> number of kernels.
    """

    span: float
    busy: float
    by_category: dict[str, float]
    counts: dict[str, int]

    @property
    def coverage(self) -> float:
        """Share of the span in which the device worked."""
        return self.busy / self.span


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
    kernels = [Kernel(e.name, e.start_ns, e.start_ns + e.duration_ns) for e in events]
    return sorted(kernels, key=lambda kernel: kernel.start)


def usage(kernels: Sequence[Kernel]) -> Usage:
    """Of kernels in order of their start, at least one."""
    by_category = dict.fromkeys(CATEGORIES, 0.0)
    counts = dict.fromkeys(CATEGORIES, 0)
    for kernel in kernels:
        by_category[kernel.category] += (kernel.end - kernel.start) / 1e9
        counts[kernel.category] += 1
    span = max(kernel.end for kernel in kernels) - kernels[0].start
    return Usage(span / 1e9, _covered(kernels) / 1e9, by_category, counts)


def _covered(kernels: Iterable[Kernel]) -> float:
    """Length of the union of the kernels' times."""
    covered, reached = 0.0, float("-inf")
    for kernel in kernels:
        covered += max(0.0, kernel.end - max(kernel.start, reached))
        reached = max(reached, kernel.end)
    return covered
