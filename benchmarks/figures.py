"""Figures of a benchmark, out of report.json."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Data = Mapping[str, Any]


def values(subject: Data, clients: int, name: str) -> list[float]:
    """A figure of a subject at one concurrency, of each round that has it."""
    found = [figure(run, name) for run in subject["runs"] if run["concurrency"] == clients]
    return [value for value in found if value is not None]


def figure(run: Data, name: str) -> float | None:
    """A figure of one run; `cpu_ms` of all parts together, None if nothing was answered."""
    value = run[name]
    if name == "cpu_ms":
        return sum(value.values()) if value else None
    return None if value is None else float(value)


def median_of(subject: Data, clients: int, name: str) -> float | None:
    found = values(subject, clients, name)
    return median(found) if found else None


def concurrencies(subject: Data) -> list[int]:
    return sorted({run["concurrency"] for run in subject["runs"]})


def best_throughput(subject: Data) -> float:
    """The best concurrency's median, good answers a second; 0 of nothing."""
    found = [median_of(subject, clients, "throughput_rps") for clients in concurrencies(subject)]
    return max((value for value in found if value is not None), default=0.0)


def best_concurrency(subject: Data) -> int:
    """The number of clients with the best median of throughput; 0 of nothing."""
    rates = {count: median_of(subject, count, "throughput_rps") for count in concurrencies(subject)}
    return max(rates, key=lambda count: rates[count] or 0.0, default=0)


def spread(found: Sequence[float], digits: int = 1) -> str:
    """Median (minimum–maximum)."""
    if not found:
        return "-"
    low, mid, high = (f"{value:.{digits}f}" for value in (min(found), median(found), max(found)))
    return mid if len(found) == 1 else f"{mid} ({low}–{high})"


def measured(data: Data, *kinds: str) -> dict[str, Data]:
    """Subjects with results, the fastest first."""
    found = {n: s for n, s in data["subjects"].items() if s["runs"] and s["kind"] in kinds}
    return dict(sorted(found.items(), key=lambda item: -best_throughput(item[1])))


def inprocess_best(data: Data, precision: str | None) -> float:
    """Images a second in process, the best batch size's median; 0 of nothing."""
    runs = data["inprocess"].get(precision, {"runs": []})["runs"]
    most = max((run["processes"] for run in runs), default=0)
    by_batch: dict[int, list[float]] = {}
    for run in runs:
        if run["processes"] == most:
            by_batch.setdefault(run["batch"], []).append(run["images_per_second"])
    return max(map(median, by_batch.values()), default=0.0)
