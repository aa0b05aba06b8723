"""The records of `LLM.get_metrics`. Each has the name that vLLM gives it, with the prefix "vjax:" for "vllm:"."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Metric:
    """One time series; `labels` tells series of the same name apart."""

    name: str
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class Counter(Metric):
    """Only grows."""

    value: int


@dataclass(kw_only=True)
class Vector(Metric):
    """Counters in a fixed order. vLLM has one, of speculative decoding; no series of vjax is of this kind."""

    values: list[int]


@dataclass(kw_only=True)
class Gauge(Metric):
    """The value of the moment."""

    value: float


@dataclass(kw_only=True)
class Histogram(Metric):
    """`buckets`: upper bound as Prometheus writes it ("0.25", "8.0", last "+Inf") -> observations up to it."""

    count: int
    sum: float
    buckets: dict[str, int]
