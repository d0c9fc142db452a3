"""When to have more workers, and when fewer: the decisions of ./scripts/scale --watch."""

import json
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from threading import Event
from typing import Any

import requests

from service.scaling.capacity import Cost, capacity_ratio
from service.scaling.memory import MemoryHeadroom, count_fitting
from service.scaling.model import Counters, Model
from service.torchserve.management import ModelState, UnknownModel

FULL_INTERVALS = 2  # in a row, until there are more workers
COST_SECONDS = 60  # over which it is measured what a request takes
# In which a worker gets ready. After that it has been given up: TorchServe tries for a minute.
START_SECONDS = 300


@dataclass(frozen=True)
class Sample:
    """What an interval was like."""

    workers: int  # that there should be
    ready: int
    requests: int  # that came in
    queue_ms: float  # mean time that a request waited for a worker
    capacity_ratio: float | None  # None: nothing was answered lately, and requests came in
    pending: int  # requests that wait, at the end
    remaining: int  # requests that can still wait, at the end


@dataclass(frozen=True)
class Decision:
    """How many workers there should be, and why."""

    workers: int
    reason: str


def measure_cost(before: Counters, after: Counters) -> Cost | None:
    """What a request took between two readings; None if the workers have reported none."""
    handled = after.handled - before.handled
    own_count = after.own_count - before.own_count
    if handled <= 0 or own_count < 0:
        return None
    return Cost(
        busy_seconds=(after.busy_seconds - before.busy_seconds) / handled,
        own_seconds=(after.own_seconds - before.own_seconds) / max(1, own_count),
    )


def compare(
    state: ModelState, before: Counters, after: Counters, seconds: float, cost: Cost | None
) -> Sample | None:
    """The interval between two readings; None if the server has started again meanwhile.

    `cost` is what a request has taken lately.
    """
    count = after.requests - before.requests
    queue_us = after.queue_us - before.queue_us
    if min(count, queue_us) < 0:
        return None
    ratio: float | None = None
    if count == 0:
        ratio = 0.0
    elif cost is not None and state.ready:
        waiting = queue_us / 1e6 / seconds
        ratio = round(capacity_ratio(count / seconds, waiting, cost, state.ready), 3)
    return Sample(
        workers=state.min_workers,
        ready=state.ready,
        requests=int(count),
        queue_ms=round(queue_us / 1000 / max(1, count), 3),
        capacity_ratio=ratio,
        pending=state.pending,
        remaining=state.remaining,
    )


class Autoscaler:
    """Decides from one sample after the other; `now` is any clock in seconds that never goes back.

    There are as many workers as bring the capacity ratio to the target, but at most twice as many
    as before, if it was above the target in two intervals in a row; and one fewer if for the whole
    cool-down the workers that are left would have been within the target. Workers that start are
    waited for. While one does not get ready there are not fewer: it may be a good one that ended.
    """

    def __init__(self, minimum: int, maximum: int, target: float, cool_down: float) -> None:
        self._minimum = minimum
        self._maximum = maximum
        self._target = target
        self._cool_down = cool_down
        self.reset()

    def reset(self) -> None:
        """Forget the past: the workers have changed, or nothing is known of a time."""
        self._above = 0
        self._quiet_since: float | None = None
        self._starting_since: float | None = None

    def decide(self, sample: Sample, now: float) -> Decision:
        """How many workers there should be; the caller calls reset() after changing them."""
        workers = sample.workers
        if workers < self._minimum:
            return Decision(self._minimum, "fewer than the minimum")
        if workers > self._maximum:
            return Decision(self._maximum, "more than the maximum")
        if sample.ready >= workers:  # more while some are being stopped
            self._starting_since = None
        elif self._starting_since is None:
            self.reset()
            self._starting_since = now
        if self._starting_since is not None and now - self._starting_since < START_SECONDS:
            return Decision(workers, "workers are starting")
        ratio = sample.capacity_ratio
        stuck = sample.pending > 0 and sample.requests == 0
        if sample.remaining == 0 or stuck or (ratio is not None and ratio > self._target):
            self._quiet_since = None
            self._above += 1
            if self._above < FULL_INTERVALS:
                return Decision(workers, "the load is high")
            if workers == self._maximum:
                return Decision(workers, "the load is high, at the maximum")
            wanted = math.ceil(workers * (ratio or 0) / self._target)
            more = min(2 * workers, max(workers + 1, wanted))
            return Decision(min(self._maximum, more), "the load is high")
        self._above = 0
        if sample.pending or ratio is None or ratio * workers > self._target * (workers - 1):
            self._quiet_since = None
            return Decision(workers, "as it should be")
        if self._quiet_since is None:
            self._quiet_since = now
        if sample.ready < workers:
            return Decision(workers, "quiet, and not every worker is ready")
        if workers == self._minimum or now - self._quiet_since < self._cool_down:
            return Decision(workers, "quiet")
        return Decision(workers - 1, "quiet")


def log(event: str, model: Model, **facts: Any) -> None:
    """One JSON object on one line."""
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "event": event,
        "model": model.name,
    }
    print(json.dumps(line | facts), flush=True)


class Watcher:
    """Looks at a model again and again, and scales it as the autoscaler decides."""

    def __init__(
        self,
        model: Model,
        autoscaler: Autoscaler,
        find_headroom: Callable[[ModelState], list[MemoryHeadroom]],
        interval: float,
        stop: Event,
    ) -> None:
        """`find_headroom` finds the memory for more workers; `interval` is seconds."""
        self._model = model
        self._autoscaler = autoscaler
        self._find_headroom = find_headroom
        self._interval = interval
        self._stop = stop
        # Of the last COST_SECONDS, with the time of each: workers report every five seconds only.
        self._readings: deque[tuple[Counters, float]] = deque()
        self._told = ""  # what is the same as the last time is not logged again

    def run(self) -> None:
        """Scale until `stop` is set. Raises UnknownModel if the model is not there at the start.

        A server that does not answer is asked again: it may be starting.
        """
        seen = False
        while True:
            try:
                self._look()
                seen = True
            except (requests.RequestException, UnknownModel) as exc:
                if isinstance(exc, UnknownModel) and not seen:
                    raise
                self._readings.clear()
                self._autoscaler.reset()
                if self._told != "unreachable":
                    log("unreachable", self._model, cause=f"{type(exc).__name__}: {exc}")
                self._told = "unreachable"
            if self._stop.wait(self._interval):
                return

    def _look(self) -> None:
        state = self._model.describe()
        counters = self._model.read_counters(self._model.find_labels(state.version))
        now = time.monotonic()
        while self._readings and now - self._readings[0][1] > COST_SECONDS:
            self._readings.popleft()
        if self._readings:
            (before, then), cost = self._readings[-1], measure_cost(self._readings[0][0], counters)
            if sample := compare(state, before, counters, now - then, cost):
                self._act(self._autoscaler.decide(sample, now), sample, state)
            else:
                self._readings.clear()
        self._readings.append((counters, now))

    def _act(self, decision: Decision, sample: Sample, state: ModelState) -> None:
        """Do what was decided, as far as memory and requests in hand allow it, and log it.

        Workers are stopped at a quiet moment alone, so that no request is lost; if there is none,
        the next interval tries again.
        """
        workers, reason = decision.workers, decision.reason
        headroom: list[MemoryHeadroom] = []
        if workers > sample.workers:
            headroom = self._find_headroom(state)
            workers = sample.workers + count_fitting(headroom, workers - sample.workers)
            if workers == sample.workers:
                reason += ", and there is no memory for more workers"
        elif workers < sample.workers and not self._model.wait_until_quiet(
            self._interval, self._stop
        ):
            workers = sample.workers
            reason += ", but never without a request in hand"
        if workers == sample.workers and reason == self._told:
            return
        facts = asdict(sample)
        if headroom:
            facts["memory"] = [asdict(kind) for kind in headroom]
        change = {"from": facts.pop("workers"), "to": workers}
        log("scale", self._model, **change, reason=reason, **facts)
        self._told = reason
        if workers != sample.workers:
            self._model.resize(workers)
            self._autoscaler.reset()
