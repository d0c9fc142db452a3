"""Answers whose figures are known."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from scipy.stats import binom

from handler.errors import SetupError
from service.evaluation.figures import Group, Share, compare, measure
from service.evaluation.run import Outcome, Run

LABELS = ("red", "green", "blue", "black", "white", "grey", "pink")
# Rows: the class that an image shows. Columns: the class that is answered.
CONFUSION = ((8, 1, 1), (0, 5, 5), (2, 0, 18))


def run_of(outcomes: Sequence[Outcome], labels: tuple[str, ...] = LABELS) -> Run:
    return Run("target", labels, list(outcomes))


def answered(truth: int, *classes: int, name: str = "a", sure: float = 0.5) -> Outcome:
    return Outcome(path=Path(name), truth=truth, classes=classes, confidence=sure)


def confused() -> list[Outcome]:
    return [
        answered(truth, predicted, (predicted + 1) % 3, name=f"{truth}{predicted}{index}")
        for truth, row in enumerate(CONFUSION)
        for predicted, count in enumerate(row)
        for index in range(count)
    ]


def test_a_confusion_matrix_gives_its_figures() -> None:
    figures = measure(run_of(confused()))
    assert (figures.images, figures.classes, figures.counted) == (40, 3, 40)
    assert (figures.top1.hits, figures.top1.of, figures.top1.share) == (31, 40, 31 / 40)
    assert figures.top5.hits == 32, "the second class is the next one: red for one image of red"
    assert [group.name for group in figures.worst] == ["green (1)", "red (0)", "blue (2)"]
    assert [group.top1.share for group in figures.worst] == [0.5, 0.8, 0.9]
    pairs = [(pair.truth, pair.predicted, pair.images) for pair in figures.confused]
    assert pairs == [
        ("green (1)", "blue (2)", 5),
        ("blue (2)", "red (0)", 2),
        ("red (0)", "green (1)", 1),
        ("red (0)", "blue (2)", 1),
    ]
    assert len(figures.confused[0].examples) == 4


@pytest.mark.parametrize(("hits", "of"), [(0, 1), (1, 1), (31, 40), (157, 200), (0, 50)])
def test_the_interval_is_wilsons(hits: int, of: int) -> None:
    """Its limits are the shares p that are z standard deviations of p from what was seen."""
    share, z = Share.count([True] * hits + [False] * (of - hits)), 1.959963984540054
    for limit in (share.low, share.high):
        if 0 < limit < 1:
            assert abs(hits / of - limit) == pytest.approx(z * math.sqrt(limit * (1 - limit) / of))
    assert 0 <= share.low <= hits / of <= share.high <= 1
    assert share.low < share.high


def test_known_confidences_give_their_calibration_error() -> None:
    """Half of 10 images with 0.9, all of 10 with 0.6, and one of 1 with certainty."""
    outcomes = [answered(0, 0 if n < 5 else 1, sure=0.9) for n in range(10)]
    outcomes += [answered(0, 0, sure=0.6) for _ in range(10)]
    outcomes.append(answered(0, 0, sure=1.0))
    calibration = measure(run_of(outcomes)).calibration
    assert calibration is not None
    assert calibration.ece == pytest.approx((10 * 0.4 + 10 * 0.4) / 21)
    assert calibration.confidence == pytest.approx((9 + 6 + 1) / 21)
    assert calibration.right == pytest.approx(16 / 21)
    assert len(calibration.bins) == 15
    assert sum(one.images for one in calibration.bins) == 21
    assert calibration.bins[-1].images == 1


def test_a_failed_image_is_wrong_unless_it_is_left_out() -> None:
    failed = Outcome(path=Path("b"), truth=0, error="UnreadableImage", message="no image")
    run = run_of([answered(0, 0), failed])
    assert measure(run).top1.share == 0.5
    left = measure(run, without_failed=True)
    assert (left.top1.share, left.images, left.counted) == (1.0, 2, 1)
    assert left.failed == measure(run).failed == {"UnreadableImage": 1}
    nothing = run_of([failed])
    assert measure(nothing).calibration is None
    with pytest.raises(SetupError, match="all 1 images failed"):
        measure(nothing, without_failed=True)


def test_slices_and_sets() -> None:
    def one(side: int | None, light: float | None, *, right: bool, size: int | None) -> Outcome:
        return Outcome(
            path=Path("a"),
            truth=0,
            classes=(0 if right else 1,),
            confidence=0.5,
            short_side=side,
            brightness=light,
            set_size=size,
            covered=right,
            unknown=not right,
        )

    figures = measure(
        run_of(
            [
                one(127, 0, right=True, size=1),
                one(128, 63.9, right=False, size=4),
                one(255, 64, right=True, size=1),
                one(4000, 255, right=True, size=2),
                one(None, None, right=False, size=None),
            ]
        )
    )
    assert _names(figures.slices["short side"]) == [
        ("not known", 0, 1),
        ("1 to 127 px", 1, 1),
        ("128 to 255 px", 1, 2),
        ("1024 px or more", 1, 1),
    ]
    assert _names(figures.slices["brightness"]) == [
        ("not known", 0, 1),
        ("dark, 0 to 63", 1, 2),
        ("dim, 64 to 127", 1, 1),
        ("bright, 192 to 255", 1, 1),
    ]
    assert figures.sets is not None
    assert (figures.sets.coverage.hits, figures.sets.coverage.of) == (3, 4)
    assert (figures.sets.mean_size, figures.sets.largest, figures.sets.single) == (2.0, 4, 2)
    assert figures.unknown is not None
    assert (figures.unknown.hits, figures.unknown.of) == (2, 5)


def _names(groups: Sequence[Group]) -> list[tuple[str, int, int]]:
    return [(group.name, group.top1.hits, group.top1.of) for group in groups]


def pair_of_runs(both: int, only_a: int, only_b: int, neither: int) -> tuple[Run, Run]:
    kinds = [(0, 0)] * both + [(0, 1)] * only_a + [(1, 0)] * only_b + [(1, 1)] * neither
    runs = [
        run_of([answered(0, kind[side], name=str(n)) for n, kind in enumerate(kinds)])
        for side in (0, 1)
    ]
    return runs[0], runs[1]


@pytest.mark.parametrize(
    ("only_a", "only_b", "verdict"),
    [
        (0, 0, "no difference shown (p=1)"),
        (3, 3, "no difference shown (p=1)"),
        (0, 5, "no difference shown (p=0.062)"),
        (0, 6, "B is better (p=0.031)"),
        (6, 0, "A is better (p=0.031)"),
        (10, 30, "B is better (p=0.0022)"),
    ],
)
def test_two_targets_are_compared_with_mcnemars_exact_test(
    only_a: int, only_b: int, verdict: str
) -> None:
    found = compare(*pair_of_runs(20, only_a, only_b, 4))
    assert (found.both, found.only_a, found.only_b, found.neither) == (20, only_a, only_b, 4)
    assert found.images == 24 + only_a + only_b
    tail = binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))
    assert found.verdict == verdict


def test_an_image_that_failed_in_one_counts_there_or_not_at_all() -> None:
    a, b = pair_of_runs(1, 1, 0, 0)
    b.outcomes[0] = Outcome(path=Path("0"), truth=0, error="UnreadableImage")
    assert compare(a, b).only_a == 2
    found = compare(a, b, without_failed=True)
    assert (found.images, found.only_a) == (1, 1)
