"""The search for the fastest configuration within a latency limit, measured by the caller.

It goes along one axis after the other, each time from the best configuration so far, until a round
changes nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One way to serve a model."""

    engine: str
    precision: str
    workers: int
    threads: int  # of each worker
    batch_size: int
    max_batch_delay_ms: int
    max_forward: int  # images in one forward pass

    @property
    def engine_name(self) -> str:
        """Engine and precision, as in "openvino bf16"."""
        return f"{self.engine} {self.precision}"

    def __str__(self) -> str:
        return (
            f"{self.engine_name}, {self.workers} x {self.threads} threads, "
            f"batch {self.batch_size}, {self.max_batch_delay_ms} ms, forward {self.max_forward}"
        )


Axis = Callable[[Configuration], list[Configuration]]  # variations of a configuration


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement: so many clients, each with one request at a time."""

    concurrency: int
    throughput_rps: float
    p50_ms: float | None  # None if no request was answered
    p99_ms: float | None
    bad: int = 0  # requests that were refused or failed

    @property
    def is_clean(self) -> bool:
        """Whether all requests were answered rightly."""
        return self.bad == 0 and self.p99_ms is not None

    def meets(self, slo_ms: float) -> bool:
        return self.is_clean and (self.p99_ms or 0.0) <= slo_ms

    def score(self, slo_ms: float) -> tuple[bool, float]:
        """For max(): what meets the SLO, by throughput; then what does not, by latency."""
        met = self.meets(slo_ms)
        return met, self.throughput_rps if met else -(self.p99_ms or 0.0)


@dataclass(frozen=True)
class Trial:
    """A configuration and its measurements, or the reason why there are none."""

    configuration: Configuration
    points: tuple[Point, ...] = ()
    failure: str | None = None

    def best(self, slo_ms: float) -> Point | None:
        """The fastest point that meets the SLO, else the closest one; None if none is clean."""
        return max(self.clean_points, key=lambda point: point.score(slo_ms), default=None)

    @property
    def clean_points(self) -> list[Point]:
        return [point for point in self.points if point.is_clean]


def find_winner(trials: Sequence[Trial], slo_ms: float) -> tuple[Trial, Point] | None:
    """The best trial with its best point, which may miss the SLO; None if all failed."""
    found = [(trial, point) for trial in trials if (point := trial.best(slo_ms))]
    return max(found, key=lambda pair: pair[1].score(slo_ms), default=None)


def pareto_front(trials: Sequence[Trial]) -> list[tuple[Trial, Point]]:
    """The points that no other exceeds in throughput at the same or a lower p99, by p99."""
    points = [(trial, point) for trial in trials for point in trial.clean_points]
    points.sort(key=lambda pair: (pair[1].p99_ms, -pair[1].throughput_rps))
    front: list[tuple[Trial, Point]] = []
    for trial, point in points:
        if not front or point.throughput_rps > front[-1][1].throughput_rps:
            front.append((trial, point))
    return front


def search(
    start: Configuration, axes: Sequence[Axis], trials: Sequence[Trial], slo_ms: float
) -> Iterator[tuple[Configuration, int]]:
    """The next configuration to measure, and about how many follow it.

    The caller adds the trial of each to `trials` before it asks for the next.
    """

    def untried(axis: Axis) -> list[Configuration]:
        done = {trial.configuration for trial in trials}
        return [candidate for candidate in axis(best()) if candidate not in done]

    def best() -> Configuration:
        winner = find_winner(trials, slo_ms)
        return winner[0].configuration if winner else start

    yield start, sum(len(axis(start)) - 1 for axis in axes)
    # The engine is not tried again: the other axes do not change which one is the fastest.
    rest = axes[1:]
    while True:
        before = best()
        for index, axis in enumerate(axes):
            later = sum(len(untried(other)) for other in axes[index + 1 :])
            candidates = untried(axis)
            for count, candidate in enumerate(candidates, start=1):
                yield candidate, len(candidates) - count + later
        if best() == before:
            return
        axes = rest
