"""The autoscaler: decisions over sequences of samples, and in front of a server of every mood."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from threading import Event
from typing import Any

import pytest

from service.processes import wait_until
from service.scaling.autoscaler import (
    START_SECONDS,
    Autoscaler,
    Decision,
    Sample,
    Watcher,
    compare,
    measure_cost,
)
from service.scaling.capacity import Cost
from service.scaling.memory import MemoryHeadroom
from service.scaling.model import Counters
from service.torchserve.management import ModelState, Worker
from tests.unit.service.scaling.conftest import Server

IDLE = Sample(
    workers=1, ready=1, requests=0, queue_ms=0, capacity_ratio=0, pending=0, remaining=100
)
HIGH = replace(IDLE, requests=50, capacity_ratio=0.8, pending=3, remaining=97)
FAR = replace(HIGH, capacity_ratio=4.2)
FULL = replace(HIGH, capacity_ratio=None, pending=100, remaining=0)  # of workers that say nothing
STUCK = replace(IDLE, pending=2, remaining=98)
CALM = replace(IDLE, requests=50, capacity_ratio=0.3)
LOADED = replace(CALM, capacity_ratio=0.65)  # too much for fewer, too little for more
UNKNOWN = replace(CALM, capacity_ratio=None)


def drive(samples: list[Sample], workers: int = 1, seconds: float = 5, **options: Any) -> list[int]:
    """The number of workers after each sample, when they start and stop at once."""
    autoscaler = Autoscaler(
        **({"minimum": 1, "maximum": 8, "target": 0.7, "cool_down": 20} | options)
    )
    numbers = []
    for index, sample in enumerate(samples):
        seen = replace(sample, workers=workers, ready=workers)
        decision = autoscaler.decide(seen, now=index * seconds)
        if decision.workers != workers:
            workers = decision.workers
            autoscaler.reset()
        numbers.append(workers)
    return numbers


@pytest.mark.parametrize(
    ("samples", "numbers"),
    [
        ([HIGH], [1]),
        ([HIGH, HIGH], [1, 2]),
        ([HIGH, LOADED, HIGH], [1, 1, 1]),  # two in a row
        ([HIGH] * 6, [1, 2, 2, 3, 3, 4]),
        ([FAR] * 6, [1, 2, 2, 4, 4, 8]),  # never more than twice as many
        (
            [replace(HIGH, capacity_ratio=1.2)] * 4,
            [1, 2, 2, 4],
        ),  # as many as bring it to the target
        ([FULL] * 4, [1, 2, 2, 3]),
        ([STUCK] * 4, [1, 2, 2, 3]),  # nothing came, and nothing was answered
        ([LOADED] * 9, [1] * 9),
    ],
)
def test_more_workers(samples: list[Sample], numbers: list[int]) -> None:
    assert drive(samples) == numbers


@pytest.mark.parametrize("sample", [HIGH, FAR, FULL])
def test_never_more_than_the_maximum(sample: Sample) -> None:
    assert max(drive([sample] * 20, maximum=3)) == 3


def test_fewer_workers_after_the_cool_down() -> None:
    """Quiet from 0 s on, then from 25 s on: each time for 20 s."""
    assert drive([CALM] * 11, workers=3) == [3, 3, 3, 3, 2, 2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize("sample", [HIGH, LOADED, UNKNOWN, replace(CALM, pending=1)])
def test_what_is_not_quiet_starts_the_cool_down_again(sample: Sample) -> None:
    assert drive([CALM] * 4 + [sample] + [CALM] * 5, workers=2) == [2] * 9 + [1]


@pytest.mark.parametrize(("ratio", "left"), [(0.46, 2), (0.47, 3)])
def test_those_that_are_left_must_be_within_the_target(ratio: float, left: int) -> None:
    assert drive([replace(CALM, capacity_ratio=ratio)] * 6, workers=3)[-1] == left


def test_never_fewer_than_the_minimum() -> None:
    assert drive([IDLE] * 50, workers=4, minimum=2)[-1] == 2


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [(1, 2, "fewer than the minimum"), (9, 4, "more than the maximum")],
)
def test_bounds_at_once(before: int, after: int, reason: str) -> None:
    sample = replace(IDLE, workers=before, ready=before)
    decision = Autoscaler(2, 4, 0.7, 60).decide(sample, 0)
    assert decision == Decision(after, reason)


def test_workers_that_start_are_waited_for() -> None:
    autoscaler = Autoscaler(1, 8, 0.7, 20)
    starting = replace(FAR, workers=2, ready=1)
    for now in range(10):
        assert autoscaler.decide(starting, now) == Decision(2, "workers are starting")
    there = replace(FAR, workers=2, ready=2)
    assert [autoscaler.decide(there, now).workers for now in (10, 11)] == [2, 4]


def test_a_worker_that_is_given_up_is_not_waited_for() -> None:
    autoscaler = Autoscaler(1, 8, 0.7, 20)
    lost = replace(FAR, workers=2, ready=1)
    times = (0, START_SECONDS - 1, START_SECONDS, START_SECONDS + 1)
    assert [autoscaler.decide(lost, now).workers for now in times] == [2, 2, 2, 4]
    idle = replace(IDLE, workers=2, ready=1)
    for now in range(START_SECONDS + 2, START_SECONDS + 60):
        assert autoscaler.decide(idle, now).workers == 2


def test_workers_that_are_being_stopped_are_no_reason_to_wait() -> None:
    autoscaler = Autoscaler(1, 8, 0.7, 20)
    stopping = replace(FAR, workers=1, ready=2)
    assert [autoscaler.decide(stopping, now).workers for now in (0, 1)] == [1, 2]


def test_load_that_comes_and_goes_ends_where_it_began() -> None:
    numbers = drive([HIGH] * 4 + [LOADED] * 4 + [IDLE] * 30)
    assert (numbers[0], max(numbers), numbers[-1]) == (1, 3, 1)
    changes = [abs(after - before) for before, after in pairwise(numbers)]
    assert sum(changes) == 4, "no going back and forth"


WORKER = Worker("9000", 1, "cpu", "READY")
STATE = ModelState("1.0", 2, (WORKER,), pending=4, remaining=96)


NOTHING = Sample(
    workers=2, ready=1, requests=0, queue_ms=0, capacity_ratio=0, pending=4, remaining=96
)
BEFORE = Counters(10, 1e6, 3e6, busy_seconds=5, handled=10, own_seconds=5, own_count=9)
COST = Cost(busy_seconds=0.02, own_seconds=0.04)


@pytest.mark.parametrize(
    ("after", "cost", "ratio"),
    [
        # 10 a second, and 0.2 that wait: 10.4 x 0.02 s, of a worker that is full if busy for 80 %
        ((60, 2e6), COST, 0.26),
        ((60, 2e6), None, None),
        ((10, 1e6), COST, 0),
        ((10, 1e6), None, 0),
    ],
)
def test_an_interval(after: tuple[float, float], cost: Cost | None, ratio: float | None) -> None:
    sample = compare(STATE, BEFORE, replace(BEFORE, requests=after[0], queue_us=after[1]), 5, cost)
    count = int(after[0] - 10)
    queue_ms = 20 if count else 0
    expected = replace(NOTHING, requests=count, queue_ms=queue_ms, capacity_ratio=ratio)
    assert sample == expected


def test_no_interval_reaches_over_a_start_of_the_server() -> None:
    after = replace(BEFORE, requests=2, queue_us=5e6)
    assert compare(STATE, BEFORE, after, 5, COST) is None


def test_what_a_request_takes() -> None:
    after = replace(BEFORE, busy_seconds=6, handled=60, own_seconds=7, own_count=49)
    assert measure_cost(BEFORE, after) == Cost(busy_seconds=1 / 50, own_seconds=2 / 40)
    probes = replace(BEFORE, busy_seconds=6, handled=60)
    assert measure_cost(BEFORE, probes) == Cost(busy_seconds=1 / 50, own_seconds=0)
    assert measure_cost(BEFORE, BEFORE) is None


class Watched:
    """A Watcher in a thread that a test starts, with its log."""

    def __init__(self, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
        self.stop = Event()
        self.headroom: list[MemoryHeadroom] = []
        self._capsys = capsys
        self._lines: list[dict[str, Any]] = []
        autoscaler = Autoscaler(1, 4, 0.7, 0.1)
        watcher = Watcher(server.model, autoscaler, lambda state: self.headroom, 0.03, self.stop)
        self.thread = threading.Thread(target=watcher.run)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        assert wait_until(condition, 20, poll_seconds=0.01), self.lines()

    def lines(self) -> list[dict[str, Any]]:
        self._lines += map(json.loads, self._capsys.readouterr().out.splitlines())
        return self._lines

    def reasons(self) -> list[str]:
        return [line.get("reason", line["event"]) for line in self.lines()]


@pytest.fixture
def watched(server: Server, capsys: pytest.CaptureFixture[str]) -> Iterator[Watched]:
    watched = Watched(server, capsys)
    yield watched
    watched.stop.set()
    watched.thread.join(20)
    assert not watched.thread.is_alive()


def test_workers_follow_the_load(server: Server, watched: Watched) -> None:
    server.coming, server.busy_seconds = 10, 1
    watched.thread.start()
    watched.wait_for(lambda: server.workers == 4)
    server.coming = 0
    watched.wait_for(lambda: server.workers == 1)
    assert server.sizes == [2, 4, 3, 2, 1]
    steps = [line for line in watched.lines() if line.get("from") != line.get("to")]
    assert [(line["from"], line["to"]) for line in steps] == [
        (1, 2), (2, 4), (4, 3), (3, 2), (2, 1)
    ]  # fmt: skip
    assert steps[0]["reason"] == "the load is high"
    assert steps[0]["capacity_ratio"] > 0.7
    assert steps[0]["requests"] >= 10


def test_never_beyond_memory(server: Server, watched: Watched) -> None:
    server.coming, server.busy_seconds = 10, 1
    watched.headroom.append(MemoryHeadroom("memory", 400, 300))
    watched.thread.start()
    reason = "the load is high, and there is no memory for more workers"
    watched.wait_for(lambda: reason in watched.reasons())
    assert server.sizes == []
    (line,) = (line for line in watched.lines() if line.get("reason") == reason)
    assert line["memory"] == [{"name": "memory", "each": 400, "free": 300}]


def test_no_worker_is_stopped_with_a_request_in_hand(server: Server, watched: Watched) -> None:
    server.workers, server.coming = 2, 1
    watched.thread.start()
    reason = "quiet, but never without a request in hand"
    watched.wait_for(lambda: reason in watched.reasons())
    assert server.sizes == []


@pytest.mark.parametrize("status", [500, 404])
def test_a_server_that_starts_again_is_waited_for(
    server: Server, watched: Watched, status: int
) -> None:
    server.workers, server.requests = 3, 1000
    watched.thread.start()
    watched.wait_for(lambda: "quiet" in watched.reasons())
    server.down = status
    watched.wait_for(lambda: "unreachable" in watched.reasons())
    server.requests, server.workers = 5, 9  # as it was started
    server.down = None
    watched.wait_for(lambda: server.sizes[-1:] == [4])
    assert watched.reasons().count("unreachable") == 1
    assert "more than the maximum" in watched.reasons()
