"""The simulation of autoscaling, and with it what the capacity ratio promises."""

import math
from dataclasses import replace
from functools import partial

import pytest

from benchmarks.autoscaling import (
    CALM_SECONDS,
    DEFAULTS,
    SPIKE_SECONDS,
    Autoscaler,
    Service,
    Settings,
    read_service,
    simulate,
    spike,
)
from benchmarks.subjects import ROOT
from service.scaling.capacity import LATE_SHARE, Cost, full_share

EXPONENTIAL = tuple(-math.log(1 - (step + 0.5) / 1000) for step in range(1000))
EVEN = Service(worker_seconds=0.1, own_seconds=0.1, spread=(1.0,))  # 20 requests/s a replica


def fixed(replicas: int) -> Settings:
    return Settings(minimum=replicas, maximum=replicas)


def steady(rate: float, second: int) -> float:
    """The same rate in every second."""
    return rate


# --- The autoscaler


def decide(*looks: tuple[int, int, float], down_window: int) -> list[int]:
    """The decision after each look at replicas, ready ones and the ratio."""
    autoscaler = Autoscaler(replace(DEFAULTS, down_window=down_window))
    return [autoscaler.decide(*look) for look in looks]


@pytest.mark.parametrize(
    ("replicas", "ready", "ratio", "wanted"),
    [
        (10, 10, 1.0, 15),  # ceil(10 x 1.0 / 0.7)
        (10, 10, 0.76, 10),  # within a tenth of the target
        (10, 10, 0.64, 10),
        (10, 5, 1.4, 10),  # those that are starting are enough
        (10, 5, 2.0, 15),
        (10, 10, 5.0, 20),  # at most twice as many
        (3, 3, 9.0, 7),  # or four more
        (80, 80, 2.0, 100),
        (4, 4, 0.0, 3),
    ],
)
def test_the_formula_of_kubernetes(replicas: int, ready: int, ratio: float, wanted: int) -> None:
    assert decide((replicas, ready, ratio), down_window=0) == [wanted]


def test_the_highest_recommendation_of_the_window_counts() -> None:
    looks = [(10, 10, ratio) for ratio in (0.6, 0.35, 0.2, 0.2, 0.2)]
    assert decide(*looks, down_window=45) == [9, 9, 9, 5, 3]


# --- The queue


def test_enough_replicas_miss_nothing() -> None:
    run = simulate(EVEN, fixed(10), lambda second: 100, seed=0)
    assert (run.missed, run.bad_seconds, run.peak, run.changes) == (0, 0, 10, 0)
    assert run.replica_hours == pytest.approx(10 * 1200 / 3600)


def test_what_cannot_be_carried_is_missed() -> None:
    """40 requests a second are answered, 60 refused, and those that are answered are late."""
    assert simulate(EVEN, fixed(2), lambda second: 100, seed=0).missed > 0.99
    quick = replace(EVEN, worker_seconds=0.005, own_seconds=0.005)  # 100 in the queue: 0.25 s
    missed = simulate(quick, fixed(1), lambda second: 800, seed=0).missed
    assert missed == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("seconds", [0.01, 0.04, 0.06])
def test_the_full_share_keeps_the_objective(seconds: float) -> None:
    """Of requests that come at random and take times of an exponential distribution."""
    mean = sum(EXPONENTIAL) / len(EXPONENTIAL)
    spread = tuple(time / mean for time in EXPONENTIAL)
    service = Service(worker_seconds=seconds, own_seconds=seconds, spread=spread)
    full = full_share(Cost(busy_seconds=seconds, own_seconds=seconds), workers=2) * 2 / seconds
    held, broken = (
        simulate(service, fixed(1), partial(steady, share * full), seed=0).missed
        for share in (0.8, 1.2)
    )
    assert held <= LATE_SHARE < broken


def test_the_same_seed_gives_the_same() -> None:
    load = spike(10, 0)
    assert simulate(EVEN, DEFAULTS, load, 1) == simulate(EVEN, DEFAULTS, load, 1)
    assert simulate(EVEN, DEFAULTS, load, 1) != simulate(EVEN, DEFAULTS, load, 2)


def test_a_spike_brings_replicas_and_takes_them_away() -> None:
    run = simulate(EVEN, DEFAULTS, spike(40, 300), 0)
    full = full_share(Cost(busy_seconds=0.1, own_seconds=0.1), workers=2)
    assert 400 / 20 / full / 0.7 < run.peak < 80
    assert run.replica_hours < run.peak * 1200 / 3600


def test_a_spike() -> None:
    at_once, slowly = spike(10, 0), spike(10, 100)
    begin, end = CALM_SECONDS, CALM_SECONDS + SPIKE_SECONDS
    assert [at_once(second) for second in (begin - 1, begin, end - 1, end)] == [10, 100, 100, 10]
    assert [slowly(begin + since) for since in (49, 99, 300)] == [55, 100, 100]


def test_a_service_of_the_report() -> None:
    service = read_service(ROOT / "benchmarks" / "report.json", "ours-gateway-bf16")
    assert 0.001 < service.worker_seconds < 0.1
    assert service.own_seconds < 0.1
    assert sum(service.spread) / len(service.spread) == pytest.approx(1)
