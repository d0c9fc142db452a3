"""The schedule of a campaign is data that its seed alone decides."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import yaml

from handler.errors import SetupError
from service.chaos.faults import FAULTS
from service.chaos.history import Attempt, Fault, History
from service.chaos.prometheus import MONITORING
from service.chaos.schedule import COMMON, KINDS, PATIENT, Step, make_schedule, read_schedule


def steps(seed: int, count: int) -> list[Step]:
    return list(islice(make_schedule(seed, replicas=2), count))


def test_a_seed_decides() -> None:
    assert steps(1, 60) == steps(1, 60)
    assert steps(1, 60) != steps(2, 60)


def test_each_round_has_every_fault_once() -> None:
    rounds = steps(3, 3 * len(KINDS))
    assert Counter(step.fault for step in rounds) == dict.fromkeys(KINDS, 3)
    assert Counter(step.fault for step in rounds[: len(KINDS)]) == dict.fromkeys(KINDS, 1)


def test_none_but_some_faults() -> None:
    steps = islice(make_schedule(3, replicas=2, faults=["scale", "crowd"]), 6)
    assert Counter(step.fault for step in steps) == {"scale": 3, "crowd": 3}


def test_faults_hit_what_they_are_for() -> None:
    for step in steps(4, 200):
        assert step.replica in ((-1,) if step.kind.target == "gateway" else (0, 1))
        assert step.kind.seconds[0] <= step.seconds <= step.kind.seconds[1]


def test_every_fault_can_be_injected() -> None:
    assert KINDS.keys() == FAULTS.keys()


def test_every_alert_of_a_fault_exists() -> None:
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text("utf-8"))["groups"]
    known = {rule["alert"]: rule.get("for", "0m") for group in groups for rule in group["rules"]}
    assert known.keys() >= COMMON
    assert {name for name, wait in known.items() if wait in ("15m", "1h")} == PATIENT
    for kind in KINDS.values():
        assert {*kind.alerts, *kind.may_raise} <= known.keys()
        longest = kind.recovery if kind.is_momentary else kind.seconds[1]
        assert all(seconds < longest for seconds in kind.alerts.values())


def test_a_fault_raises_an_alert_or_there_is_a_reason() -> None:
    assert all(bool(kind.alerts) != bool(kind.unraised) for kind in KINDS.values())


def test_a_history_is_a_schedule(tmp_path: Path) -> None:
    """So a campaign can be played again, and lines of it left out."""
    history = History(tmp_path / "history")
    history.add(Attempt(request=0, attempt=1, time=0, seconds=1, form="raw", target="/",
                        statuses=(200,)))  # fmt: skip
    for step in steps(5, 3):
        fault = Fault(fault=step.fault, replica=step.replica, seconds=step.seconds,
                      calm=step.calm, begin=1, end=2, recovered=3)  # fmt: skip
        history.add(fault)
    assert read_schedule(tmp_path / "history") == steps(5, 3)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"fault": "kill_worker"}', json.dumps({"fault": "flood", "replica": 0,
                                                               "seconds": 1, "calm": 1})]
)  # fmt: skip
def test_what_is_no_schedule(tmp_path: Path, text: str) -> None:
    path = tmp_path / "schedule"
    path.write_text(text)
    with pytest.raises(SetupError):
        read_schedule(path)
