"""Percentiles, and what counts in a measurement."""

import pytest

from service.load.measurement import Load, Sample, percentile, summarise


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([], 50, None),
        ([7.0], 99, 7.0),
        ([3.0, 1.0, 2.0, 4.0], 50, 2.0),  # two of four do not exceed it
        ([3.0, 1.0, 2.0, 4.0], 51, 3.0),
        ([float(i) for i in range(1, 101)], 99, 99.0),
        ([float(i) for i in range(1, 101)], 100, 100.0),
        ([1.0, 2.0], 0, 1.0),
    ],
)
def test_percentile_is_by_nearest_rank(
    values: list[float], percent: float, expected: float | None
) -> None:
    assert percentile(values, percent) == expected


def test_only_what_was_due_in_the_measured_time_counts() -> None:
    samples = [
        Sample(0.5, 0.5, 1.2, "ok"),  # due in the warm-up, answered within
        Sample(1.0, 1.1, 1.5, "ok"),
        Sample(1.9, 1.9, 2.9, "ok"),  # answered late: its latency counts, throughput does not
        Sample(1.2, 1.2, 1.3, "refused"),
        Sample(1.2, 1.2, 1.4, "HTTP 500"),
        Sample(1.3, 1.3),
        Sample(2.0, 2.0, 2.1, "ok"),
    ]
    result = summarise(samples, 1.0, 2.0, Load(seconds=1, rate=5), cpu_percent=7)
    assert (result.requests, result.ok, result.refused, result.failed) == (5, 2, 1, 2)
    assert result.failures == {"HTTP 500": 1, "unanswered": 1}
    assert result.throughput_rps == 2
    assert result.p50_ms == pytest.approx(500)
    assert result.p99_ms == pytest.approx(1000)
    assert result.refused_p50_ms == pytest.approx(100)
    assert result.start_lag_p99_ms == pytest.approx(100)
