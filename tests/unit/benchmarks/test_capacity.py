"""The parts of the test of the capacity ratio; the whole is a benchmark."""

from itertools import pairwise
from statistics import mean, pstdev
from typing import Any

import pytest

from benchmarks.capacity import find_full, is_right, random_times, share_within
from service.load.measurement import Sample


def test_requests_come_at_random() -> None:
    times = list(random_times(100.0, 300.0, rate=50, seed=3))
    assert len(times) == pytest.approx(10_000, rel=0.03)
    gaps = [after - before for before, after in pairwise(times)]
    assert min(gaps) > 0
    assert mean(gaps) == pytest.approx(0.02, rel=0.03)
    assert pstdev(gaps) == pytest.approx(mean(gaps), rel=0.05), "exponential gaps"
    assert 100 < times[0] < times[-1] < 300
    assert times == list(random_times(100.0, 300.0, rate=50, seed=3))


def test_only_right_answers_in_time_are_within() -> None:
    samples = [
        Sample(due=1.0, started=1.0, ended=1.4, outcome="ok"),
        Sample(due=1.1, started=1.1, ended=1.6, outcome="ok"),
        Sample(due=1.2, started=1.5, ended=1.8, outcome="ok"),  # due long before it was sent
        Sample(due=1.3, started=1.3, ended=1.3, outcome="refused"),
        Sample(due=1.4, started=1.4),
        Sample(due=0.9, started=0.9, ended=1.0, outcome="ok"),  # of the warm-up
        Sample(due=2.0, started=2.0, ended=2.0, outcome="ok"),
    ]
    assert share_within(samples, 1.0, 2.0) == pytest.approx(2 / 5)


@pytest.mark.parametrize("first", [60, 150, 190])
def test_the_full_rate_is_found(first: float) -> None:
    """Of a service that carries 200, whose requests cost less the more of them come."""
    asked = []

    def ratio_at(rate: float) -> float:
        asked.append(rate)
        busy = rate * (0.006 - 0.000005 * rate)
        return busy * (1 + 0.004 / max(0.001, 1 - rate / 210))  # and those that wait

    full = find_full(first, ratio_at)
    assert asked[0] == first
    assert len(asked) <= 5
    assert ratio_at(full) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("at", "right"),
    [
        ({0.8: True, 1.2: False}, True),
        ({0.8: True, 1.2: True}, False),
        ({0.8: False, 1.2: False}, False),
    ],
)
def test_the_verdict(at: dict[float, bool], right: bool) -> None:
    runs: list[dict[str, Any]] = [{"share": share, "holds": holds} for share, holds in at.items()]
    assert is_right({"runs": runs}) is right
