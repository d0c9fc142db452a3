"""Intervals that hold at all times, and what they say about a new version."""

import math
import os

import numpy as np
import pytest

from service.rollout.judgement import (
    FALSE_ALARMS,
    QUANTILES,
    Bounds,
    Counts,
    count_seconds,
    interval,
    judge,
)
from service.rollout.steps import Step, make_steps

BOUNDS = Bounds(max_errors=0.01, max_slowdown=1.5, max_disagreement=0.2)
ALPHA = FALSE_ALARMS / 8
SLOW = (0.02, 0.04)
ROLLOUTS = int(os.environ.get("ROLLOUTS", "100"))  # simulated; see docs/rollout.md
LOOKS = 20  # a step


def counts(requests: int, errors: int = 0, seconds: float = 0.01, **more: int) -> Counts:
    answers = count_seconds([seconds] * (requests - errors))
    return Counts(requests=requests, errors=errors, seconds=answers, **more)


def broken(new: Counts, old: Counts) -> list[str]:
    return [f.what for f in judge(new, old, SLOW, BOUNDS, ALPHA) if f.is_broken]


@pytest.mark.parametrize(("hits", "trials"), [(0, 50), (50, 50), (3, 1000), (500, 1000)])
def test_the_limits_are_where_the_mixture_is_one_over_alpha_times_as_likely(
    hits: int, trials: int
) -> None:
    """The likelihood of the mixture of all shares, integrated by hand."""
    steps = (np.arange(400_000) + 0.5) / 400_000
    weights = 1 / np.sqrt(steps * (1 - steps))
    logs = hits * np.log(steps) + (trials - hits) * np.log1p(-steps)
    mixture = np.log(np.average(np.exp(logs - logs.max()), weights=weights)) + logs.max()
    low, high = interval(hits, trials, 0.01)
    assert (low == 0.0) == (hits == 0)
    assert (high == 1.0) == (hits == trials)
    for limit in {low, high} - {0.0, 1.0}:
        at = hits * math.log(limit) + (trials - hits) * math.log1p(-limit)
        assert mixture - at == pytest.approx(math.log(100), abs=0.05)


def test_the_share_leaves_its_interval_ever_with_at_most_alpha() -> None:
    rng = np.random.default_rng(0)
    left = 0
    for _ in range(300):
        hits = (rng.random(400) < 0.1).cumsum()
        limits = [interval(int(hits[n - 1]), n, 0.1) for n in range(1, 401, 3)]
        left += any(not low <= 0.1 <= high for low, high in limits)
    assert left <= 0.1 * 300


def test_a_version_like_the_old_one_is_not_worse() -> None:
    assert broken(counts(500), counts(5000)) == []
    assert broken(counts(500, 25), counts(5000, 250)) == []


def test_nothing_is_said_before_anything_is_seen() -> None:
    assert broken(Counts(), Counts()) == []
    assert broken(counts(2, 2), counts(1)) == []


def test_a_version_that_fails_is_worse_after_a_few_requests() -> None:
    assert broken(counts(8, 8), counts(1000)) == ["failed"]


def test_a_slow_version_is_worse_after_a_few_requests() -> None:
    found = broken(counts(25, seconds=0.2), counts(1000))
    assert found == ["slower than 30 ms", "slower than 60 ms"]


def test_a_version_that_takes_as_long_as_is_tolerated_is_not_slow() -> None:
    old = Counts(requests=1000, seconds=count_seconds([0.02] * 1000))
    new = Counts(requests=1000, seconds=count_seconds([0.03] * 1000))
    assert broken(new, old) == []


def test_a_version_that_disagrees_is_worse() -> None:
    new = counts(40, compared=40, disagreements=30)
    assert broken(new, counts(1000)) == ["another best class"]
    assert broken(counts(400, compared=400, disagreements=70), counts(1000)) == []


def test_errors_are_held_against_the_bound_if_the_old_version_is_unknown() -> None:
    assert broken(counts(300, 60), Counts()) == ["failed"]
    assert broken(counts(300), Counts()) == []


class Simulated:
    """A rollout of a version that is as good as the old one, and fails and disagrees at times."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.errors = rng.choice([0.0, 0.001, 0.01, 0.1])
        self.disagreements = rng.uniform(0, 0.19)
        self.spread = rng.uniform(0.1, 1.0)

    def seen(self, requests: int, compared: int) -> list[Counts]:
        """The counts at each look of a step."""
        failed = self.rng.random(requests) < self.errors
        seconds = 0.02 * np.exp(self.spread * self.rng.standard_normal(requests))
        other = self.rng.random(compared) < self.disagreements
        found = []
        for look in range(1, LOOKS + 1):
            end, upto = requests * look // LOOKS, compared * look // LOOKS
            found.append(
                Counts(
                    requests=end,
                    errors=int(failed[:end].sum()),
                    compared=upto,
                    disagreements=int(other[:upto].sum()),
                    seconds=count_seconds(seconds[:end][~failed[:end]].tolist()),
                )
            )
        return found

    def is_taken_back(self, steps: list[Step], requests: int = 400) -> bool:
        [*_, first] = self.seen(requests, 0)
        slow = [first.quantile(share) for share in QUANTILES]
        alpha = FALSE_ALARMS / (len(steps) + 1)
        alone = first
        for step in steps[1:]:
            share = step.percent / 100
            new = max(LOOKS, round(requests * (share + (1 - share) * step.shadow / 100)))
            shadows = round(requests * (1 - share) * step.shadow / 100)
            olds = self.seen(round(requests * (1 - share)), 0)
            for now, old in zip(self.seen(new, shadows), olds, strict=True):
                judged = judge(now, alone if step.is_last else old, slow, BOUNDS, alpha)
                if any(finding.is_broken for finding in judged):
                    return True
            alone = olds[-1] if not step.percent else alone
        return False


def test_fewer_than_one_in_a_hundred_good_versions_are_taken_back() -> None:
    rng = np.random.default_rng(18)
    steps = make_steps((1, 5, 25, 50, 100), shadow=10)
    taken_back = sum(Simulated(rng).is_taken_back(steps) for _ in range(ROLLOUTS))
    print(f"{taken_back} of {ROLLOUTS} simulated rollouts were taken back")
    assert taken_back < FALSE_ALARMS * ROLLOUTS
