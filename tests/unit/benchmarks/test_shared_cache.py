"""The verdicts of the shared cache's benchmark: each promise alone can be broken."""

from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks.shared_cache import verdicts

HIT = {"cpu_ms": 4.0, "p50_ms": 5.0, "failed": 0}
PREDICTION = {"cpu_ms": 20.0, "p50_ms": 25.0, "failed": 0}
RUNNING = {"p99_ms": 40.0, "failed": 0}
STOPPED = {"p99_ms": 49.9, "failed": 0}


def kept(**changed: Mapping[str, Any]) -> list[bool]:
    hits = {
        "with": {**HIT, **changed.get("hit", {})},
        "without": {**PREDICTION, **changed.get("prediction", {})},
    }
    hang = {"running": RUNNING, "stopped": {**STOPPED, **changed.get("stopped", {})}}
    return list(verdicts(hits, hang).values())


def test_all_are_kept_at_their_limits() -> None:
    assert kept() == [True] * 4


@pytest.mark.parametrize(
    ("changed", "broken"),
    [
        ({"hit": {"cpu_ms": 4.1}}, 0),
        ({"hit": {"p50_ms": 5.1}}, 1),
        ({"stopped": {"p99_ms": 50.0}}, 2),
        ({"stopped": {"failed": 1}}, 3),
        ({"prediction": {"failed": 1}}, 3),
    ],
)
def test_a_broken_one_is_said(changed: dict[str, Any], broken: int) -> None:
    assert kept(**changed) == [place != broken for place in range(4)]
