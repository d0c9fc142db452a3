"""The plots of REPORT.md."""

from pathlib import Path
from statistics import median

from benchmarks.figures import Data, concurrencies, measured, median_of, values
from service.plots import plot


def plot_throughput(data: Data, path: Path) -> None:
    """A bar for each server: its best median, with the extremes of that concurrency."""
    subjects = measured(data, "ours", "peer")
    with plot(path, 8, 1 + 0.3 * max(1, len(subjects))) as axes:
        for position, (name, subject) in enumerate(reversed(subjects.items())):
            found = max(
                (values(subject, count, "throughput_rps") for count in concurrencies(subject)),
                key=median,
            )
            mid = median(found)
            error = [[mid - min(found)], [max(found) - mid]]
            colour = "tab:orange" if subject["kind"] == "ours" else "tab:blue"
            axes.barh(position, mid, xerr=error, color=colour, label=name)
        axes.set_yticks(range(len(subjects)), list(reversed(subjects)))
        axes.set_xlabel("good answers a second, at the best concurrency")


def plot_latency(data: Data, path: Path) -> None:
    """A line for each server: p95 against throughput, a point for each concurrency."""
    with plot(path, 8, 5) as axes:
        for name, subject in measured(data, "ours", "peer").items():
            points = [
                (median_of(subject, count, "throughput_rps"), median_of(subject, count, "p95_ms"))
                for count in concurrencies(subject)
            ]
            known = [point for point in points if None not in point]
            if known:
                width = 2.5 if subject["kind"] == "ours" else 1
                axes.plot(*zip(*known, strict=True), marker="o", linewidth=width, label=name)
        axes.set(xlabel="good answers a second", ylabel="p95 latency, ms", yscale="log")
        if axes.lines:
            axes.legend(fontsize=7, ncols=2)
