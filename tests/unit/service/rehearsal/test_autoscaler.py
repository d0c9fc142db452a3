"""The autoscaler decides as Kubernetes' does."""

import copy
from typing import Any

import pytest

from handler.errors import SetupError
from service.rehearsal.autoscaler import Autoscaler

SPEC: dict[str, Any] = {
    "minReplicas": 2,
    "maxReplicas": 10,
    "metrics": [
        {
            "type": "Pods",
            "pods": {
                "metric": {"name": "classifier_capacity_ratio"},
                "target": {"type": "AverageValue", "averageValue": "700m"},
            },
        }
    ],
    "behavior": {
        "scaleUp": {
            "policies": [
                {"type": "Percent", "value": 100, "periodSeconds": 30},
                {"type": "Pods", "value": 2, "periodSeconds": 30},
            ]
        },
        "scaleDown": {"policies": [{"type": "Pods", "value": 1, "periodSeconds": 120}]},
    },
}


def changed(direction: str = "", **values: Any) -> dict[str, Any]:
    """SPEC with other values, of its own or of one direction."""
    spec = copy.deepcopy(SPEC)
    (spec["behavior"][direction] if direction else spec).update(values)
    return spec


def follow(spec: dict[str, Any], current: int, *readings: tuple[float, float]) -> list[int]:
    """The pods after each reading: the time, and the metric of every pod."""
    autoscaler, sizes = Autoscaler(spec), []
    for now, value in readings:
        current = autoscaler.decide(now, current, [value] * current)
        sizes.append(current)
    return sizes


def test_another_kind_of_metric() -> None:
    with pytest.raises(SetupError, match="must be of type Pods, got Resource"):
        Autoscaler(changed(metrics=[{"type": "Resource"}]))


def test_without_a_behavior_it_may_double_or_add_four_at_once() -> None:
    autoscaler = Autoscaler(changed(behavior=None))
    assert autoscaler.decide(0, 2, [3.5, 3.5]) == 6


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.7, 0.7], 2),
        ([0.76, 0.76], 2),  # within a tenth of the target
        ([0.78, 0.78], 3),
        ([1.4, 1.4], 4),
        ([1.4, 0.0], 2),  # the mean counts
        ([], 2),  # nobody knows
        ([None, None], 2),
        ([1.4, None], 2),  # one of which nothing is known counts as idle
        ([2.8, None], 4),
        ([2.8, 2.8], 4),  # 8 by the formula, and the policies allow twice as many
        ([0.2, None], 2),
    ],
)
def test_the_formula(values: list[float | None], expected: int) -> None:
    assert Autoscaler(SPEC).decide(0, 2, values) == expected


def test_up_at_once_and_never_above_the_maximum() -> None:
    steps = [(0, 2.0), (15, 2.0), (31, 2.0), (62, 2.0)]
    assert follow(SPEC, 2, *steps) == [4, 4, 8, 10]


def test_the_policy_that_allows_most_counts_unless_the_least_is_selected() -> None:
    least = changed("scaleUp", selectPolicy="Min")
    disabled = changed("scaleUp", selectPolicy="Disabled")
    assert follow(SPEC, 4, (0, 2.0)) == [8]
    assert follow(least, 4, (0, 2.0)) == [6]
    assert follow(disabled, 4, (0, 2.0)) == [4]


def test_down_after_the_window_and_one_by_one() -> None:
    readings = [(float(now), 0.7 if now == 0 else 0.1) for now in range(0, 631, 15)]
    sizes = follow(SPEC, 5, *readings)
    changed = [index * 15 for index, size in enumerate(sizes) if index and size != sizes[index - 1]]
    assert changed == [315, 435, 555]
    assert sizes[-1] == 2


def test_a_dip_within_the_window_changes_nothing() -> None:
    readings = [(15.0 * n, 0.1 if n % 4 else 0.7) for n in range(60)]
    assert set(follow(SPEC, 5, *readings)) == {5}


def test_bounds_that_have_changed() -> None:
    assert follow(changed(maxReplicas=3), 4, (0, 0.7), (301, 0.7)) == [3, 3]
    assert follow(changed(minReplicas=4), 2, (0, 0.7)) == [4]
