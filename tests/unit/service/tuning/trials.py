"""Trials that were never measured."""

from dataclasses import replace
from typing import Any

from service.tuning.search import Configuration, Point, Trial

SLO_MS = 100.0
START = Configuration(
    engine="openvino",
    precision="fp32",
    workers=4,
    threads=1,
    batch_size=8,
    max_batch_delay_ms=1,
    max_forward=4,
)
ENGINES = [("openvino", "fp32"), ("openvino", "int8"), ("torch", "fp32")]
BEST = replace(
    START,
    precision="int8",
    workers=2,
    threads=2,
    batch_size=16,
    max_batch_delay_ms=2,
    max_forward=8,
)


def trial(throughput: float, p99: float | None, bad: int = 0, **changes: Any) -> Trial:
    point = Point(concurrency=1, throughput_rps=throughput, p50_ms=p99, p99_ms=p99, bad=bad)
    return Trial(replace(START, **changes), (point,))


def surface(configuration: Configuration) -> Trial:
    """100 req/s at BEST, and less for each field in which a configuration differs."""
    different = sum(value != getattr(BEST, name) for name, value in vars(configuration).items())
    size = abs(configuration.batch_size - BEST.batch_size) / 100
    return Trial(configuration, trial(100 - 10 * different - size, 50.0).points)
