"""When to have more workers, and when fewer: the decisions of ./scripts/scale --watch."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from threading import Event
from typing import Any

import requests

from service.scaling.memory import MemoryHeadroom, count_fitting
from service.scaling.model import Counters, Model
from service.torchserve.management import ModelState, UnknownModel

SLOW_INTERVALS = 2  # in a row, until there are more workers
FAR_OVER = 4  # times the target: the workers are doubled
QUIET_SHARE = 0.5  # of the target: a shorter queue is no reason to keep all workers
BUSY_SHARE = 0.7  # how busy the workers that are left may be


@dataclass(frozen=True)
class Sample:
    """What an interval was like."""

    workers: int  # that there should be
    ready: int
    requests: int  # that came in
    queue_ms: float  # mean time that a request waited for a worker
    busy: float  # workers that had a request in hand, on average; of a batch each counts
    pending: int  # requests that wait, at the end
    remaining: int  # requests that can still wait, at the end


@dataclass(frozen=True)
class Decision:
    """How many workers there should be, and why."""

    workers: int
    reason: str


def compare(state: ModelState, before: Counters, after: Counters, seconds: float) -> Sample | None:
    """The interval between two readings; None if the server has started again meanwhile."""
    count = after.requests - before.requests
    queue_us = after.queue_us - before.queue_us
    latency_us = after.latency_us - before.latency_us
    if min(count, queue_us, latency_us) < 0:
        return None
    return Sample(
        workers=state.min_workers,
        ready=state.ready,
        requests=int(count),
        queue_ms=round(queue_us / 1000 / max(1, count), 3),
        busy=round(max(0.0, latency_us - queue_us) / 1e6 / seconds, 3),
        pending=state.pending,
        remaining=state.remaining,
    )


class Autoscaler:
    """Decides from one sample after the other; `now` is any clock in seconds that never goes back.

    There are more workers if the queue was too long in two intervals in a row, and one fewer if for
    the whole cool-down it was short and the workers that are left would not be too busy.
    """

    def __init__(self, minimum: int, maximum: int, queue_ms: float, cool_down: float) -> None:
        self._minimum = minimum
        self._maximum = maximum
        self._target = queue_ms
        self._cool_down = cool_down
        self.reset()

    def reset(self) -> None:
        """Forget the past: the workers have changed, or nothing is known of a time."""
        self._slow = 0
        self._quiet_since: float | None = None

    def decide(self, sample: Sample, now: float) -> Decision:
        """How many workers there should be; the caller calls reset() after changing them."""
        workers = sample.workers
        if workers < self._minimum:
            return Decision(self._minimum, "fewer than the minimum")
        if workers > self._maximum:
            return Decision(self._maximum, "more than the maximum")
        if sample.ready < workers:
            self.reset()
            return Decision(workers, "workers are starting")
        full = sample.remaining == 0
        stuck = sample.pending > 0 and sample.requests == 0
        if full or stuck or sample.queue_ms > self._target:
            self._quiet_since = None
            self._slow += 1
            if self._slow < SLOW_INTERVALS:
                return Decision(workers, "the queue is long")
            if workers == self._maximum:
                return Decision(workers, "the queue is long, at the maximum")
            far = full or sample.queue_ms > FAR_OVER * self._target
            more = workers * 2 if far else workers + 1
            return Decision(min(self._maximum, more), "the queue is long")
        self._slow = 0
        calm = sample.queue_ms <= QUIET_SHARE * self._target and sample.pending == 0
        if not calm or sample.busy > BUSY_SHARE * (workers - 1):
            self._quiet_since = None
            return Decision(workers, "as it should be")
        if self._quiet_since is None:
            self._quiet_since = now
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
        self._before: tuple[Counters, float] | None = None  # with the time of their reading
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
                self._before = None
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
        if self._before:
            before, then = self._before
            if sample := compare(state, before, counters, now - then):
                self._act(self._autoscaler.decide(sample, now), sample, state)
        self._before = (counters, now)

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
