"""What a part of the service costs: loads with and without it, on one running server.

Two servers, or one server at two times, differ by more than what is looked for. So the two loads
take turns in many short slices, in an order in which both come equally early. How far the slices
of one load differ among themselves says how much the difference of the two is worth.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median, stdev
from typing import Any

from benchmarks.servers import Started
from benchmarks.usage import Meter
from service.load.images import ImageRequest
from service.load.measurement import Load

ORDER = (0, 1, 1, 0) * 8
SLICES = 5  # that last as long together as a measurement
WARMUP_SECONDS = 0.3  # of each slice
PROBE = {"X-Probe": "1"}  # a health check: an ordinary prediction, in no metric and no log line


@dataclass
class Side:
    """What was measured of one load."""

    rates: list[float] = field(default_factory=list)  # of each slice
    answered: int = 0
    failed: int = 0
    cpu_ms: float = 0.0  # of all processes of the server, for all requests
    p50_ms: list[float] = field(default_factory=list)  # of each slice

    def figures(self) -> dict[str, Any]:
        return {
            "throughput_rps": sum(self.rates) / len(self.rates),
            "standard_error_rps": stdev(self.rates) / len(self.rates) ** 0.5,
            "cpu_ms": self.cpu_ms / self.answered if self.answered else None,
            "p50_ms": median(self.p50_ms) if self.p50_ms else None,
            "failed": self.failed,
        }


def without_gateway(target: Started) -> Started:
    return replace(target, url=target.direct_url)


def without_metrics(target: Started) -> Started:
    """Neither the handler's metrics nor the log's lines; TorchServe's own remain."""
    return replace(target, headers={**target.headers, **PROBE})


def measure_pair(
    loaded: Started, bare: Started, images: Sequence[ImageRequest], clients: int, seconds: float
) -> dict[str, Any]:
    """Throughput, CPU time a request and p50 `with` and `without`.

    `seconds` are those of an ordinary measurement; this one takes six times as long.
    """
    targets, sides = (loaded, bare), (Side(), Side())
    load = Load(concurrency=clients, seconds=seconds / SLICES, warmup_seconds=WARMUP_SECONDS)
    loaded.measure(images, load)  # the first slice comes after another load, and counts for neither
    for index in ORDER:
        target, side, meter = targets[index], sides[index], Meter(loaded.server)
        run = target.measure(images, load, meter)
        answered = round(run.throughput_rps * run.seconds)
        side.rates.append(run.throughput_rps)
        side.answered += answered
        side.failed += run.failed + run.refused
        side.cpu_ms += answered * sum(meter.ms_per_request(run).values())
        if run.p50_ms is not None:
            side.p50_ms.append(run.p50_ms)
    return {"clients": clients, "with": sides[0].figures(), "without": sides[1].figures()}
