"""Which settings of an autoscaler keep the latency objective through a tenfold spike: a simulation.

Replicas with the rate and the times of a measured report answer requests that come at random. The
rules of Kubernetes' HorizontalPodAutoscaler (autoscaling/v2) read the capacity ratio late, as from
Prometheus, and start replicas that take a while. Nothing is measured here, so that any machine will
do; the same seed gives the same figures.

A request takes the worker that is free first, which is what "to the replica with the fewest
requests" comes to while replicas are alike. One that would find the queues full is refused.
"""

import argparse
import heapq
import json
import math
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.figures import best_throughput, median_of
from benchmarks.subjects import ROOT
from service.scaling.capacity import LATE_SHARE, OBJECTIVE_SECONDS, Cost, capacity_ratio
from service.tables import markdown_table

WORKERS = 2  # of a replica in the report
QUEUE = 100  # requests that TorchServe lets wait, in each replica
SYNC_SECONDS = 15  # the HPA's, and the period of its policies
TOLERANCE = 0.1  # the HPA's: a smaller deviation from the target changes nothing
CALM_SECONDS, SPIKE_SECONDS, AFTER_SECONDS = 300, 600, 600
TIMES = 10


@dataclass(frozen=True, kw_only=True)
class Service:
    """A replica as it was measured."""

    worker_seconds: float  # of a worker, for a request, at the best rate
    own_seconds: float  # that a request takes if it does not wait
    spread: tuple[float, ...]  # of the times: percentiles 0 to 100, by their mean


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of the autoscaler, of Prometheus, and what starting a replica takes."""

    target: float = 0.7
    minimum: int = 3
    maximum: int = 100
    up_percent: int = 100  # more replicas in 15 s, or 4 if that is more
    down_window: int = 300  # seconds, of which the highest recommendation counts
    window: int = 60  # of rate() in the rules
    scrape: int = 10
    evaluation: int = 15
    start: int = 15  # seconds from a pod's creation until it is ready
    seen: bool = False  # whether refused requests reach a replica, or only the gateway


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """From the begin of the spike to the end of what is simulated."""

    missed: float  # share of requests that were refused or late
    bad_seconds: int  # in which it was more than LATE_SHARE
    peak: int  # replicas
    replica_hours: float
    changes: int  # of the number of replicas


def read_service(path: Path, subject: str) -> Service:
    """The figures of a subject of a report.json."""
    found = json.loads(path.read_text())["subjects"][subject]
    worker_seconds = WORKERS / best_throughput(found)
    p50, p90, p95, p99 = (median_of(found, 1, f"p{n}_ms") or 0.0 for n in (50, 90, 95, 99))
    # The report does not say what is below the median, nor above the 99th percentile.
    times = np.interp(np.arange(101), (0, 50, 90, 95, 99, 100), (p50, p50, p90, p95, p99, p99))
    spread = tuple(float(value) for value in times / times.mean())
    return Service(worker_seconds=worker_seconds, own_seconds=p50 / 1000, spread=spread)


class Autoscaler:
    """The HPA: one look every SYNC_SECONDS."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._wanted: deque[int] = deque(maxlen=max(1, settings.down_window // SYNC_SECONDS))

    def decide(self, replicas: int, ready: int, ratio: float) -> int:
        """The number of replicas; those that are starting count as idle, if more are needed."""
        settings = self._settings
        wanted = replicas
        if ratio * ready / replicas > settings.target * (1 + TOLERANCE):
            wanted = math.ceil(ready * ratio / settings.target)
        elif ratio < settings.target * (1 - TOLERANCE) and ready == replicas:
            wanted = math.ceil(replicas * ratio / settings.target)
        self._wanted.append(wanted)
        most = max(math.ceil(replicas * (1 + settings.up_percent / 100)), replicas + 4)
        wanted = min(wanted, most) if wanted > replicas else min(replicas, max(self._wanted))
        return max(settings.minimum, min(settings.maximum, wanted))


def simulate(
    service: Service, settings: Settings, rate: Callable[[int], float], seed: int
) -> Outcome:
    """What becomes of the requests of `rate(second)`; they count from CALM_SECONDS on."""
    seconds = CALM_SECONDS + SPIKE_SECONDS + AFTER_SECONDS
    random = np.random.default_rng(seed)
    autoscaler = Autoscaler(settings)
    cost = Cost(busy_seconds=service.worker_seconds, own_seconds=service.own_seconds)
    longest_wait = QUEUE * service.worker_seconds / WORKERS
    free = [0.0] * (WORKERS * settings.minimum)  # when each worker is free, a heap
    starting: deque[int] = deque()  # when each replica is ready
    ratios: list[float] = []  # by second, of the window before it
    arrived: list[int] = []
    waited: list[float] = []
    total = missed = bad_seconds = changes = replica_seconds = peak = 0
    for second in range(seconds):
        while starting and starting[0] <= second:
            starting.popleft()
            for _ in range(WORKERS):
                heapq.heappush(free, float(second))
        ready = len(free) // WORKERS
        span = slice(-settings.window, None)
        length = max(1, len(arrived[span]))
        load = sum(arrived[span]) / length / ready, sum(waited[span]) / length / ready
        ratios.append(capacity_ratio(*load, cost, WORKERS))
        if second % SYNC_SECONDS == 0:
            evaluated = second - second % settings.evaluation
            scraped = evaluated - evaluated % settings.scrape
            replicas = ready + len(starting)
            wanted = autoscaler.decide(replicas, ready, ratios[scraped])
            changes += wanted != replicas and second >= CALM_SECONDS
            starting.extend([second + settings.start] * (wanted - replicas))
            for _ in range(replicas - wanted):
                if starting:
                    starting.pop()
                else:
                    for _ in range(WORKERS):
                        heapq.heappop(free)  # it finishes what it has
        count = int(random.poisson(rate(second)))
        times = second + np.sort(random.random(count))
        factors = random.choice(service.spread, count)
        refused = late = 0
        waits = 0.0
        for due, factor in zip(times.tolist(), factors.tolist(), strict=True):
            wait = max(0.0, free[0] - due)
            if wait > longest_wait:
                refused += 1
                continue
            waits += wait
            heapq.heapreplace(free, due + wait + factor * service.worker_seconds)
            late += wait + factor * service.own_seconds > OBJECTIVE_SECONDS
        arrived.append(count if settings.seen else count - refused)
        waited.append(waits)
        if second >= CALM_SECONDS:
            total += count
            missed += refused + late
            bad_seconds += refused + late > LATE_SHARE * count
            replica_seconds += len(free) // WORKERS + len(starting)
            peak = max(peak, len(free) // WORKERS)
    return Outcome(
        missed=missed / total,
        bad_seconds=bad_seconds,
        peak=peak,
        replica_hours=replica_seconds / 3600,
        changes=changes,
    )


def spike(low: float, ramp: int) -> Callable[[int], float]:
    """TIMES the load after CALM_SECONDS, for SPIKE_SECONDS, reached in `ramp` seconds."""

    def rate(second: int) -> float:
        since = second - CALM_SECONDS
        if not 0 <= since < SPIKE_SECONDS:
            return low
        return low * (1 + (TIMES - 1) * min(1.0, (since + 1) / max(1, ramp)))

    return rate


DEFAULTS = Settings()
QUICK = replace(DEFAULTS, scrape=5, evaluation=5, window=30)
EAGER = replace(QUICK, seen=True, up_percent=900)
STEP: dict[str, Settings] = {
    "Kubernetes' defaults, target 0.7": DEFAULTS,
    "up to 900 % more in 15 s": replace(DEFAULTS, up_percent=900),
    "scraped and computed every 5 s, over 30 s": QUICK,
    "replicas see what is refused": replace(DEFAULTS, seen=True),
    "all three": EAGER,
    "all three, target 0.35": replace(EAGER, target=0.35),
    "all three, image not on the node: 45 s": replace(EAGER, start=45),
    "all three, a new node first: 150 s": replace(EAGER, start=150),
    "defaults, never fewer than 22 replicas": replace(DEFAULTS, minimum=22),
}
TWO_MINUTES = {
    "Kubernetes' defaults, target 0.7": DEFAULTS,
    "defaults, target 0.5": replace(DEFAULTS, target=0.5),
    "all three": EAGER,
}
FIVE_MINUTES = {
    "Kubernetes' defaults, target 0.7": DEFAULTS,
    "defaults, image not on the node: 45 s": replace(DEFAULTS, start=45),
    "all three, image not on the node: 45 s": replace(EAGER, start=45),
    "all three, a new node first: 150 s": replace(EAGER, start=150),
    "defaults, down window of 0 s": replace(DEFAULTS, down_window=0),
}
SCENARIOS = [
    ("at once", 0, STEP),
    ("in 2 min", 120, TWO_MINUTES),
    ("in 5 min", 300, FIVE_MINUTES),
]
HEADINGS = ("tenfold", "settings", "missed", "seconds", "most replicas", "replica hours", "changes")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.autoscaling",
        description="Simulate autoscaling through a tenfold spike, with measured service times.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--report", type=Path, default=ROOT / "benchmarks" / "report.json")
    parser.add_argument("--subject", default="ours-gateway-bf16", help="of the report")
    parser.add_argument("--load", type=float, default=500, help="requests a second before")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    service = read_service(args.report, args.subject)
    print(
        f"{args.subject}: {WORKERS / service.worker_seconds:.1f} requests/s a replica, "
        f"{1000 * service.own_seconds:.1f} ms without a wait; {args.load:g}/s, then "
        f"{TIMES * args.load:g}/s for {SPIKE_SECONDS} s, {AFTER_SECONDS} s after it; "
        f"seed {args.seed}\n"
    )
    rows = []
    for speed, ramp, settings in SCENARIOS:
        rate = spike(args.load, ramp)
        for name, choice in settings.items():
            run = simulate(service, choice, rate, args.seed)
            missed = f"{run.missed:.1%}" if run.missed > LATE_SHARE else f"**{run.missed:.1%}**"
            figures = run.bad_seconds, run.peak, round(run.replica_hours, 1), run.changes
            rows.append((speed, name, missed, *figures))
    print("\n".join(markdown_table(HEADINGS, rows, left=(0, 1))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
