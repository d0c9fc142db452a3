"""Whether a server that the capacity ratio calls full is full.

An open loop of requests that come at random, as those of many clients do, finds the rate at which
the ratio is 1. At 0.8 of that rate the objective has to hold, and at 1.2 it must not.
"""

import asyncio
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

from benchmarks.alone import started_alone
from benchmarks.conditions import conditions
from benchmarks.environments import SetupFailed
from benchmarks.servers import Started, StartFailed, make_parser, say
from benchmarks.subjects import ROOT
from service.load.generator import TIMEOUT_SECONDS, Generator, cpu_percent
from service.load.images import ImageRequest
from service.load.measurement import Load, Measurement, Sample, summarise
from service.load.wire import Wire
from service.scaling.autoscaler import compare, measure_cost
from service.scaling.capacity import LATE_SHARE, OBJECTIVE_SECONDS
from service.scaling.model import Counters, Model
from service.tables import markdown_table
from service.torchserve.management import Management

FILE = "capacity.json"
CLIENTS = 8  # of the closed loop that finds where to begin
FIRST = 0.7  # of that loop's rate
TRIES = 5  # loads until the full rate is known
CLOSE = 0.1  # of the ratio to 1, and no more loads are needed
SLOWEST_STEP = 0.7  # a ratio below it does not say how much more is carried
SHARES = (0.5, 0.8, 1.0, 1.2)  # of the full rate
HOLDS, FAILS = 0.8, 1.2
WARMUP_SECONDS = 5.0  # the workers report every 5 s
ONE_CLIENT = {"GATEWAY_MAX_CONCURRENT_PER_CLIENT": "256"}  # this one stands for many
HEADINGS = (
    *("of full", "requests/s", "ratio", "within the objective", "p50 ms", "p99 ms"),
    *("refused", "failed", "generator"),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One rate. `ratio` is None if the workers reported nothing meanwhile."""

    rate: float
    ratio: float | None
    within: float  # share of the requests that got a right answer within the objective
    load: Measurement

    @property
    def holds(self) -> bool:
        return self.within >= 1 - LATE_SHARE


def random_times(begin: float, end: float, rate: float, seed: int) -> Iterator[float]:
    """A Poisson process: when requests of clients that know nothing of each other come."""
    gaps = random.Random(seed)  # noqa: S311  # no secret
    due = begin + gaps.expovariate(rate)
    while due < end:
        yield due
        due += gaps.expovariate(rate)


def share_within(samples: Sequence[Sample], begin: float, end: float) -> float:
    """Of the requests due between two times, those with a right answer within the objective."""
    due = [sample for sample in samples if begin <= sample.due < end]
    good = [s for s in due if s.outcome == "ok" and s.ended - s.due <= OBJECTIVE_SECONDS]
    return len(good) / max(1, len(due))


def find_full(first: float, ratio_at: Callable[[float], float]) -> float:
    """The rate at which the ratio is 1, about, found from a rate below it.

    The ratio is not proportional to the rate: a batch costs less than its requests alone, and a
    queue grows fast when there is little room left.
    """
    rate, below, above = first, (0.0, 0.0), (math.inf, math.inf)
    for _ in range(TRIES):
        ratio = ratio_at(rate)
        found = rate, ratio
        below, above = (found, above) if ratio < 1 else (below, found)
        if math.isinf(above[0]):
            rate /= max(ratio, SLOWEST_STEP)
        else:  # on the line between the two
            rate = below[0] + (above[0] - below[0]) * (1 - below[1]) / (above[1] - below[1])
        if abs(ratio - 1) <= CLOSE:
            break
    return rate


class Server:
    """A started server, with the figures that the ratio is made from."""

    def __init__(self, target: Started, model: str, images: Sequence[ImageRequest]) -> None:
        direct = target.direct_url.removesuffix(f"/predictions/{model}")
        host, port = direct.rsplit(":", 1)
        management = Management(f"{host}:{int(port) + 1}")
        self._model = Model(management, f"{host}:{int(port) + 2}", model)
        self._target = target
        self._images = cycle(images)

    def closed_loop(self, seconds: float) -> float:
        """Good answers a second to a few clients."""
        load = Load(concurrency=CLIENTS, seconds=seconds, warmup_seconds=WARMUP_SECONDS)
        return self._target.measure([next(self._images) for _ in range(200)], load).throughput_rps

    def open_loop(self, rate: float, seconds: float, seed: int = 0) -> Run:
        return asyncio.run(self._open_loop(rate, seconds, seed))

    async def _open_loop(self, rate: float, seconds: float, seed: int) -> Run:
        wire = Wire(self._target.url, TIMEOUT_SECONDS)
        generator = Generator(wire.post, self._images, self._target.expectations)
        load = Load(rate=rate, seconds=seconds, warmup_seconds=WARMUP_SECONDS)
        start = time.perf_counter()
        begin, end = start + WARMUP_SECONDS, start + WARMUP_SECONDS + seconds
        sending = generator.send_at(random_times(start, end, rate, seed))
        _, ratio, cpu = await asyncio.gather(
            sending, self._ratio(begin, end), cpu_percent(begin, end)
        )
        wire.close()
        run = summarise(generator.samples, begin, end, load, cpu)
        within = share_within(generator.samples, begin, end)
        return Run(rate=rate, ratio=ratio, within=within, load=run)

    async def _ratio(self, begin: float, end: float) -> float | None:
        """What ./scripts/scale --watch would see of the time between two moments."""
        await asyncio.sleep(begin - time.perf_counter())
        before, then = await self._read()
        await asyncio.sleep(end - time.perf_counter())
        after, now = await self._read()
        state = await asyncio.to_thread(self._model.describe)
        cost = measure_cost(before, after)
        sample = compare(state, before, after, now - then, cost)
        return sample.capacity_ratio if sample else None

    async def _read(self) -> tuple[Counters, float]:
        state = await asyncio.to_thread(self._model.describe)
        labels = self._model.find_labels(state.version)
        return await asyncio.to_thread(self._model.read_counters, labels), time.perf_counter()


def measure(server: Server, seconds: float) -> dict[str, Any]:
    """The full rate, and the loads at shares of it. Raises StartFailed if nothing is answered."""
    best = server.closed_loop(seconds / 4)
    say(f"{CLIENTS} clients: {best:.1f} requests/s")

    def ratio_at(rate: float) -> float:
        run = server.open_loop(rate, seconds / 2)
        say(f"{rate:.1f} requests/s: ratio {run.ratio}")
        if not run.ratio:
            raise StartFailed("the workers report nothing of what they answer")
        return run.ratio

    full = find_full(FIRST * best, ratio_at)
    say(f"full by the ratio: {full:.1f} requests/s")
    runs = []
    for share in SHARES:
        run = server.open_loop(share * full, seconds, seed=1)
        say(f"{share:.1f} of it: ratio {run.ratio}, {run.within:.1%} within the objective")
        runs.append({"share": share} | asdict(run) | {"holds": run.holds})
    return {"closed_loop_rps": best, "full_rps": full, "runs": runs}


def is_right(data: Mapping[str, Any]) -> bool:
    """Whether the objective holds where it should, and does not where it should not."""
    holds = {run["share"]: run["holds"] for run in data["runs"]}
    return holds[HOLDS] and not holds[FAILS]


def table(data: Mapping[str, Any]) -> str:
    rows = []
    for run in data["runs"]:
        load = run["load"]
        within = f"{run['within']:.1%}"
        cpu = f"{load['generator_cpu_percent']:.0f}%"
        ratio = None if run["ratio"] is None else f"{run['ratio']:.2f}"
        times = load["p50_ms"], load["p99_ms"]
        counts = load["refused"], load["failed"]
        rows.append((str(run["share"]), run["rate"], ratio, within, *times, *counts, cpu))
    return "\n".join(markdown_table(HEADINGS, rows))


def main(argv: Sequence[str] | None = None) -> int:
    description = "Load a service at shares of the rate that the capacity ratio calls full."
    parser = make_parser("capacity", description, "mobilenet_v2", ROOT / "benchmarks")
    parser.set_defaults(seconds=30)
    args = parser.parse_args(argv)
    try:
        with started_alone(args, **ONE_CLIENT) as alone:
            found = measure(Server(alone.target, args.model, alone.images), args.seconds)
            known = {"conditions": conditions(alone.servers, alone.images)}
    except (SetupFailed, StartFailed) as exc:
        print(f"failed: {exc}", file=sys.stderr)
        return 1
    data = known | {"seconds": args.seconds} | found
    (args.out / FILE).write_text(json.dumps(data, indent=1) + "\n")
    right = is_right(data)
    print(f"\n{table(data)}\n")
    print(f"held at {HOLDS} and not at {FAILS} of what the ratio calls full: {right}")
    print(json.dumps(data))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
