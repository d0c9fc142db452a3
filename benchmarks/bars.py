"""What this service is to reach, and whether it did: the report's first section.

Each figure comes from report.json, each verdict from comparing it with its bar here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.costs import mib_of, p50_cost, rate_cost
from benchmarks.figures import Data, concurrencies, measured, median_of
from benchmarks.usage import JAVA, WORKER
from service.tables import markdown_table

BASELINE = "stock-omp1"
P50_MS = 1.0  # that one client may wait longer than with the best peer
CPU_RATIO = 1.10  # of its CPU time a request, with one client
RATES = {8: 1.15, 32: 1.25}  # clients -> times the best peer's rate
STOCK_RATES = {  # model -> times the stock handler's rate: int8, other precisions
    "mobilenet_v2": (4.5, 4.0),
    "resnet50": (4.5, 3.0),
}
TOP_1_POINTS = {"int8": 1.5}  # that top-1 may be below fp32's
TOP_1_POINTS_ELSE = 0.5
MEMORY_MB = 900  # of Java and the workers
ANSWERED = 95  # percent of the best rate, under overload
RECOVERY_SECONDS = 2.0
COSTS = (  # kind of subject, clients, what is compared, in words, and at most
    ("gateway", 8, rate_cost, "rate that the gateway costs", 5.0, "{:.1f} %"),
    ("gateway", 1, p50_cost, "p50 that the gateway costs", 0.5, "{:.2f} ms"),
    ("ours", 8, rate_cost, "rate that metrics and logs cost", 2.0, "{:.1f} %"),
)


@dataclass(frozen=True)
class Bar:
    what: str
    required: str
    measured: str
    is_met: bool

    @classmethod
    def at_least(cls, what: str, low: float, value: float, form: str, note: str = "") -> "Bar":
        return cls(what, f"at least {form.format(low)}", form.format(value) + note, value >= low)

    @classmethod
    def at_most(cls, what: str, high: float, value: float, form: str, note: str = "") -> "Bar":
        return cls(what, f"at most {form.format(high)}", form.format(value) + note, value <= high)


def bars(data: Data) -> list[str]:
    """The table; nothing if none of the figures was measured."""
    found = [bar for part in PARTS for bar in part(data)]
    rows = [
        [bar.what, bar.required, bar.measured, "met" if bar.is_met else "**missed**"]
        for bar in found
    ]
    if not rows:
        return []
    met = sum(bar.is_met for bar in found)
    legend = (
        f"{met} of {len(found)} are met. The best peer is the one with the highest rate at that "
        "concurrency, of those with our engine in the same precision and right answers alone. "
        "Figures are medians over the rounds."
    )
    headings = ["bar", "required", "measured", "verdict"]
    return [*markdown_table(headings, rows, left=(0, 1, 2, 3)), "", legend]


def right_peers(data: Data) -> dict[str, Data]:
    """The peers all of whose answers were right, the fastest first."""
    peers = measured(data, "peer")
    return {n: s for n, s in peers.items() if not any(run["failed"] for run in s["runs"])}


def against_peers(data: Data) -> Iterator[Bar]:
    for name, subject in measured(data, "ours").items():
        for clients in concurrencies(subject):
            best, peer = best_peer(data, subject, clients)
            if peer is None:
                continue
            own, their = figures(subject, clients), figures(peer, clients)
            if own.keys() == their.keys() == set(COMPARED):
                yield from against_peer(name, clients, best, own, their)


COMPARED = ("throughput_rps", "p50_ms", "p99_ms", "cpu_ms")


def figures(subject: Data, clients: int) -> dict[str, float]:
    """The medians of COMPARED that there are."""
    found = {key: median_of(subject, clients, key) for key in COMPARED}
    return {key: value for key, value in found.items() if value is not None}


def best_peer(data: Data, subject: Data, clients: int) -> tuple[str, Data | None]:
    """The fastest peer at one concurrency with our engine in the precision of `subject`."""
    rates = {
        name: rate
        for name, peer in right_peers(data).items()
        if peer["precision"] == subject["precision"]
        and (rate := median_of(peer, clients, "throughput_rps")) is not None
    }
    best = max(rates, key=lambda name: rates[name], default="")
    return best, data["subjects"].get(best)


def against_peer(
    name: str, clients: int, best: str, own: dict[str, float], their: dict[str, float]
) -> Iterator[Bar]:
    start = f"{name}, {clients} client{'s' if clients > 1 else ''}"
    if clients == 1:
        above = own["p50_ms"] - their["p50_ms"]
        note = f" ({own['p50_ms']:.1f} against {their['p50_ms']:.1f}, {best})"
        yield Bar.at_most(f"{start}: p50 above the best peer's", P50_MS, above, "{:.2f} ms", note)
        ratio = own["cpu_ms"] / their["cpu_ms"]
        note = f" ({own['cpu_ms']:.2f} against {their['cpu_ms']:.2f} ms, {best})"
        what = f"{start}: CPU time a request, of the best peer's"
        yield Bar.at_most(what, CPU_RATIO, ratio, "{:.2f} times", note)
    elif clients in RATES:
        ratio = own["throughput_rps"] / their["throughput_rps"]
        note = f" ({own['throughput_rps']:.1f} against {their['throughput_rps']:.1f}, {best})"
        what = f"{start}: rate, of the best peer's"
        yield Bar.at_least(what, RATES[clients], ratio, "{:.2f} times", note)
        what, note = f"{start}: p99, of that peer's", f" ({best})"
        yield Bar.at_most(what, their["p99_ms"], own["p99_ms"], "{:.1f} ms", note)


def against_stock(data: Data) -> Iterator[Bar]:
    required = STOCK_RATES.get(data["conditions"]["model"])
    baseline = data["subjects"].get(BASELINE)
    if required is None or baseline is None:
        return
    for name, subject in measured(data, "ours").items():
        low = required[0] if subject["precision"] == "int8" else required[1]
        for clients in concurrencies(subject):
            own = median_of(subject, clients, "throughput_rps")
            their = median_of(baseline, clients, "throughput_rps")
            if own is not None and their:
                what = (
                    f"{name}, {clients} client{'s' if clients > 1 else ''}: rate, of {BASELINE}'s"
                )
                note = f" ({own:.1f} against {their:.1f})"
                yield Bar.at_least(what, low, own / their, "{:.2f} times", note)


def accuracy(data: Data) -> Iterator[Bar]:
    reference = data["reference"]
    for name, subject in measured(data, "ours").items():
        found = subject["accuracy"]
        if not reference or not found:
            continue
        high = TOP_1_POINTS.get(subject["precision"], TOP_1_POINTS_ELSE)
        points = [100 * counts["right"] / counts["images"] for counts in (reference, found)]
        below = points[0] - points[1]
        note = f" ({points[1]:.1f} against {points[0]:.1f} %)"
        yield Bar.at_most(f"{name}: top-1 below fp32's", high, below, "{:.1f} points", note)


def memory(data: Data) -> Iterator[Bar]:
    for name, subject in measured(data, "ours").items():
        sizes = [mib_of(found, (JAVA, WORKER)) for found in subject["memory"]]
        if sizes:
            size, count = median(sizes), data["conditions"]["workers"]
            what = f"{name}: PSS of Java and {count} workers"
            note = f" ({size:.0f} MiB)"
            yield Bar.at_most(what, MEMORY_MB, size * 2**20 / 1e6, "{:.0f} MB", note)


def overload(data: Data) -> Iterator[Bar]:
    for name, found in data["overload"].items():
        for run in found["runs"]:
            start = f"{name}, {run['times']} times the best rate"
            share, raw = (100 * rate / run["best_rps"] for rate in answered(data, run))
            what = f"{start}: answered, of the best rate"
            note = f" ({raw:.0f} % without allowing for the load generator)"
            yield Bar.at_least(what, ANSWERED, share, "{:.0f} %", note)
            failed = run["failed"] + run["after_failed"]
            yield Bar.at_most(f"{start}: neither answered nor refused", 0, failed, "{}")
            back = run["full_speed_seconds"]
            what, seconds = f"{start}: full speed again after", f"at most {RECOVERY_SECONDS} s"
            if back is None:
                yield Bar(what, seconds, "not within the time that was measured", False)
            else:
                yield Bar.at_most(what, RECOVERY_SECONDS, back, "{:.2f} s")


def answered(data: Data, run: Data) -> tuple[float, float]:
    """Good answers a second under overload: allowing for the generator's CPU time, and as it was.

    The generator sends many times more than it did when the best rate was found, on the same cores.
    What it took more of them is taken as lost to the server.
    """
    cores = 100 * data["conditions"]["machine"]["cores"]
    before = cores - run["best_generator_cpu_percent"]
    left = cores - run["generator_cpu_percent"]
    rate = run["throughput_rps"]
    return rate * before / left if left > 0 else rate, rate


def costs(data: Data) -> Iterator[Bar]:
    for kind, clients, cost, what, high, form in COSTS:
        for name, subject in measured(data, kind).items():
            start = f"{name}, {clients} client{'s' if clients > 1 else ''}"
            if found := costs_of(subject, clients, cost):
                yield Bar.at_most(f"{start}: {what}", high, median(found), form)


def costs_of(subject: Data, clients: int, cost: Callable[[Data], float | None]) -> Sequence[float]:
    """A cost in each round."""
    found = [cost(pair) for pair in subject["pairs"] if pair["clients"] == clients]
    return [value for value in found if value is not None]


PARTS = (against_peers, against_stock, accuracy, memory, overload, costs)
