"""What tuning has found: a table for people, and a plot."""

from collections.abc import Sequence
from pathlib import Path

from service.plots import plot
from service.tables import Row, text_table
from service.tuning.search import Point, Trial, find_winner, pareto_front

HEADINGS = ("engine", "workers x threads", "batch", "delay ms", "forward")
FIGURES = ("clients", "req/s", "p50 ms", "p99 ms", "SLO")


def report(trials: Sequence[Trial], slo_ms: float) -> str:
    """Every configuration at its best point, fastest first, and the Pareto front of all points."""
    best = [(trial, point) for trial in trials if (point := trial.best(slo_ms))]
    best.sort(key=lambda pair: pair[1].score(slo_ms), reverse=True)
    failed = [f"{t.configuration}: {t.failure}" for t in trials if t.best(slo_ms) is None]
    return "\n".join(
        [
            "",
            f"Configurations, each with the clients that suit it best under p99 {slo_ms:g} ms:",
            *_table(best, slo_ms),
            *(["", "Configurations that failed:", *failed] if failed else []),
            "",
            "Pareto front (no other measurement is both faster and of lower p99):",
            *_table(pareto_front(trials), slo_ms),
            "",
        ]
    )


def _table(measured: Sequence[tuple[Trial, Point]], slo_ms: float) -> list[str]:
    def row(trial: Trial, point: Point) -> Row:
        c = trial.configuration
        shares = f"{c.workers} x {c.threads}"
        settings = (c.engine_name, shares, c.batch_size, c.max_batch_delay_ms, c.max_forward)
        figures = (point.concurrency, point.throughput_rps, point.p50_ms, point.p99_ms)
        return (*settings, *figures, "met" if point.meets(slo_ms) else None)

    return text_table((*HEADINGS, *FIGURES), [row(*pair) for pair in measured])


def plot_trials(trials: Sequence[Trial], slo_ms: float, title: str, path: Path) -> None:
    """Throughput against p99: every measurement, the Pareto front, the SLO and the winner.

    Raises OSError.
    """

    def points_of(points: Sequence[Point]) -> tuple[list[float], list[float]]:
        return [p.p99_ms or 0.0 for p in points], [p.throughput_rps for p in points]

    by_engine: dict[str, list[Point]] = {}
    for trial in trials:
        by_engine.setdefault(trial.configuration.engine_name, []).extend(trial.clean_points)
    front = [point for _, point in pareto_front(trials)]
    winner = find_winner(trials, slo_ms)
    with plot(path, 7.5, 4.8) as axes:
        for name, points in sorted(by_engine.items()):
            axes.scatter(*points_of(points), s=18, label=name)
        axes.step(*points_of(front), where="post", color="0.4", linewidth=1, label="Pareto front")
        axes.axvline(slo_ms, color="tab:red", linestyle="--", linewidth=1, label="SLO")
        if winner and winner[1].meets(slo_ms):
            axes.plot(*points_of([winner[1]]), "*", color="black", ms=13, label="winner")
        axes.set(xlabel="p99, ms", ylabel="good answers a second", title=title)
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.legend()
