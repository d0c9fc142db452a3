"""The winner, the Pareto front, and the search."""

from collections.abc import Callable

from service.tuning.search import Configuration, Trial, find_winner, pareto_front, search
from service.tuning.space import make_axes
from tests.unit.service.tuning.trials import BEST, ENGINES, SLO_MS, START, surface, trial


def test_the_winner_is_the_fastest_that_meets_the_slo() -> None:
    trials = [trial(10, 20), trial(30, 100), trial(40, 100.1), trial(50, 30, bad=1)]
    assert find_winner(trials, SLO_MS) == (trials[1], trials[1].points[0])


def test_the_closest_wins_if_none_meets_the_slo() -> None:
    trials = [trial(30, 300), trial(10, 150), trial(5, None, bad=3)]
    assert find_winner(trials, SLO_MS) == (trials[1], trials[1].points[0])


def test_pareto_front() -> None:
    points = [(10, 20), (30, 40), (25, 45), (30, 50), (60, 90), (50, 90), (5, 10)]
    front = pareto_front([trial(*point) for point in points] + [trial(99, 1, bad=1)])
    assert [(p.throughput_rps, p.p99_ms) for _, p in front] == [
        (5, 10),
        (10, 20),
        (30, 40),
        (60, 90),
    ]


def run(measure: Callable[[Configuration], Trial], **given: int) -> list[Trial]:
    """All trials of a search on four cores without a GPU."""
    trials: list[Trial] = []
    for configuration, _ in search(START, make_axes(ENGINES, 4, 0, given), trials, SLO_MS):
        trials.append(measure(configuration))
    return trials


def test_search_finds_the_best_and_measures_nothing_twice() -> None:
    trials = run(surface)
    winner = find_winner(trials, SLO_MS)
    assert winner is not None
    assert winner[0].configuration == BEST
    assert len({trial.configuration for trial in trials}) == len(trials)
    assert trials[0].configuration == START  # what is served without tuning
    assert len(trials) < 50  # and not the hundreds of a full grid


def test_search_respects_the_slo() -> None:
    """The fastest engine misses the SLO, so another one wins."""

    def measure(configuration: Configuration) -> Trial:
        fast = configuration.precision == "int8"
        return Trial(configuration, trial(200, 101).points if fast else trial(50, 99).points)

    winner = find_winner(run(measure), SLO_MS)
    assert winner is not None
    assert winner[0].configuration.precision == "fp32"


def test_search_goes_on_after_failures() -> None:
    def measure(configuration: Configuration) -> Trial:
        if configuration.engine == "openvino":
            return Trial(configuration, failure="no such engine")
        return surface(configuration)

    winner = find_winner(run(measure), SLO_MS)
    assert winner is not None
    assert winner[0].configuration.engine == "torch"


def test_search_ends_if_everything_fails() -> None:
    trials = run(lambda one: Trial(one, failure="no"))
    assert find_winner(trials, SLO_MS) is None
    assert pareto_front(trials) == []


def test_search_keeps_what_is_given() -> None:
    tried = [
        one.configuration for one in run(surface, workers=4, batch_size=8, max_batch_delay_ms=1)
    ]
    assert {(c.workers, c.batch_size, c.max_batch_delay_ms) for c in tried} == {(4, 8, 1)}
    assert len({c.engine for c in tried}) == 2
