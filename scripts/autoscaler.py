"""When to have more workers, and when fewer: the decisions of scripts/scale.py --watch."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from threading import Event
from typing import Any

import requests

from scripts.workers import Counters, Model, Space, State, UnknownModel, count_fitting

SLOW_INTERVALS = 2  # in a row, until there are more workers
FAR_OVER = 4  # times the target: the workers are doubled
QUIET_SHARE = 0.5  # of the target: a queue that is no reason to keep the workers
BUSY_SHARE = 0.7  # of the time of the workers that would be left


@dataclass(frozen=True)
class Sample:
    """What an interval was like."""

    wanted: int  # workers that there should be
    ready: int
    requests: int  # that came
    queue_ms: float  # mean time that a request waited for a worker
    busy: float  # workers that had a request in hand, on average; of a batch each counts
    pending: int  # requests that wait, at the end
    remaining: int  # requests that can still wait, at the end


@dataclass(frozen=True)
class Decision:
    """So many workers, and why."""

    workers: int
    reason: str


def compare(state: State, before: Counters, after: Counters, seconds: float) -> Sample | None:
    """The interval between two readings; None where the server has started again meanwhile."""
    count = after.requests - before.requests
    queue_us = after.queue_us - before.queue_us
    latency_us = after.latency_us - before.latency_us
    if min(count, queue_us, latency_us) < 0:
        return None
    return Sample(
        wanted=state.wanted,
        ready=state.ready,
        requests=int(count),
        queue_ms=round(queue_us / 1000 / max(1, count), 3),
        busy=round(max(0.0, latency_us - queue_us) / 1e6 / seconds, 3),
        pending=state.pending,
        remaining=state.remaining,
    )


class Autoscaler:
    """Decides from one sample after the other; `now` is any clock in seconds that never goes back.

    More workers when the queue was too long in two intervals in a row, one fewer when for the whole
    cool-down it was short and the workers that are left would not be too busy.
    """

    def __init__(self, minimum: int, maximum: int, queue_ms: float, cool_down: float) -> None:
        self._minimum = minimum
        self._maximum = maximum
        self._target = queue_ms
        self._cool_down = cool_down
        self.reset()

    def reset(self) -> None:
        """Forget what was: the workers have changed, or nothing is known of a time."""
        self._slow = 0
        self._quiet_since: float | None = None

    def decide(self, sample: Sample, now: float) -> Decision:
        """How many workers there should be; the caller calls reset() after changing them."""
        wanted = sample.wanted
        if wanted < self._minimum:
            return Decision(self._minimum, "fewer than the minimum")
        if wanted > self._maximum:
            return Decision(self._maximum, "more than the maximum")
        if sample.ready < wanted:
            self.reset()
            return Decision(wanted, "workers are starting")
        full = sample.remaining == 0
        stuck = sample.pending > 0 and sample.requests == 0
        if full or stuck or sample.queue_ms > self._target:
            self._quiet_since = None
            self._slow += 1
            if self._slow < SLOW_INTERVALS:
                return Decision(wanted, "the queue is long")
            if wanted == self._maximum:
                return Decision(wanted, "the queue is long, at the maximum")
            far = full or sample.queue_ms > FAR_OVER * self._target
            return Decision(
                min(self._maximum, wanted * 2 if far else wanted + 1), "the queue is long"
            )
        self._slow = 0
        calm = sample.queue_ms <= QUIET_SHARE * self._target and sample.pending == 0
        if not calm or sample.busy > BUSY_SHARE * (wanted - 1):
            self._quiet_since = None
            return Decision(wanted, "as it should be")
        if self._quiet_since is None:
            self._quiet_since = now
        if wanted == self._minimum or now - self._quiet_since < self._cool_down:
            return Decision(wanted, "quiet")
        return Decision(wanted - 1, "quiet")


def log(event: str, model: Model, **facts: Any) -> None:
    """One JSON object on one line."""
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "event": event,
        "model": model.name,
    }
    print(json.dumps(line | facts), flush=True)


def watch(
    model: Model,
    autoscaler: Autoscaler,
    find_spaces: Callable[[State], list[Space]],
    interval: float,
    stop: Event,
) -> None:
    """Scale a model until `stop` is set. Raises UnknownModel where it is not there at the start.

    A server that does not answer is asked again. Workers are stopped at a quiet moment alone, so
    that no request is lost; where there is none, the next interval tries again.
    """
    before: tuple[Counters, float] | None = None
    told = ""  # what is the same as the last time is not logged again
    seen = False
    while True:
        try:
            state = model.describe()
            counters, now = model.read_counters(state.version), time.monotonic()
            seen = True
            sample = before and compare(state, before[0], counters, now - before[1])
            before = (counters, now)
            if sample:
                told = _step(model, autoscaler, sample, state, find_spaces, (interval, stop), told)
        except (requests.RequestException, UnknownModel) as exc:
            if isinstance(exc, UnknownModel) and not seen:
                raise
            before = None
            autoscaler.reset()
            if told != "unreachable":
                log("unreachable", model, cause=f"{type(exc).__name__}: {exc}")
            told = "unreachable"
        if stop.wait(interval):
            return


def _step(
    model: Model,
    autoscaler: Autoscaler,
    sample: Sample,
    state: State,
    find_spaces: Callable[[State], list[Space]],
    pause: tuple[float, Event],
    told: str,
) -> str:
    """Decide and do it; gives what the log has said last."""
    decision = autoscaler.decide(sample, time.monotonic())
    workers, reason = decision.workers, decision.reason
    spaces: list[Space] = []
    if workers > sample.wanted:
        spaces = find_spaces(state)
        workers = sample.wanted + count_fitting(spaces, workers - sample.wanted)
        if workers == sample.wanted:
            reason += ", and there is no memory for more workers"
    elif workers < sample.wanted and not model.wait_until_quiet(*pause):
        workers = sample.wanted
        reason += ", but never without a request in hand"
    if workers == sample.wanted and reason == told:
        return told
    facts = asdict(sample) | ({"memory": [asdict(space) for space in spaces]} if spaces else {})
    log("scale", model, **{"from": facts.pop("wanted"), "to": workers}, reason=reason, **facts)
    if workers != sample.wanted:
        model.resize(workers)
        autoscaler.reset()
    return reason
