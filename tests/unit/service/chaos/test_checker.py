"""The checker on histories that are made up: each breaks one promise, or none."""

from dataclasses import replace
from pathlib import Path

import pytest

from service.chaos.checker import check
from service.chaos.history import (
    Alert,
    Attempt,
    Ended,
    Fault,
    History,
    Left,
    Monitored,
    Record,
    Usage,
    from_lines,
)

PROMISED = 20.0
STOPPED = Fault(fault="stop_java", replica=0, seconds=11, calm=1, begin=40, end=51, recovered=52)
GOOD = Attempt(
    request=1,
    attempt=1,
    time=50,
    seconds=0.1,
    form="form",
    target="/predict",
    statuses=(200,),
    status=200,
    right="red 1.jpg",
    answered="red 1.jpg",
    answer_id="a",
)
REFUSED = replace(
    GOOD, request=2, statuses=(400,), status=400, right="", answered="", reason="NoImage",
    answer_id="b",
)  # fmt: skip
KILLED = Fault(
    fault="kill_nginx_worker", replica=-1, seconds=0, calm=1, begin=49, end=50, recovered=52
)
JAVA = replace(KILLED, fault="kill_java", replica=0)
DOWN = Alert(alert="ClassifierDown", state="pending", instance="a:1", replica=0, begin=43, end=57)
MONITORED = Monitored(time=0)
UNANSWERED = replace(GOOD, status=0, answered="", answer_id="", error="ConnectionResetError")
AGAIN = replace(GOOD, attempt=2, time=51)


def broken(*records: Record) -> list[str]:
    """The names of the promises that a history breaks."""
    verdicts = check(History(records=[*records]), PROMISED)
    return [verdict.rule.name for verdict in verdicts if verdict.broken]


def using(pid: int, megabytes_per_minute: float, per_minute: float = 0) -> list[Usage]:
    """What a process uses that lives for ten minutes."""
    return [
        Usage(
            time=time,
            process="java of replica 0",
            pid=pid,
            rss=int((300 + megabytes_per_minute * time / 60) * 2**20),
            descriptors=int(100 + per_minute * time / 60),
        )
        for time in range(0, 600, 10)
    ]


@pytest.mark.parametrize(
    "records",
    [
        [],
        [GOOD, REFUSED, KILLED],
        # A client hung up.
        [replace(GOOD, statuses=(), status=0, answered="")],
        # nginx was killed; the second attempt was answered.
        [KILLED, UNANSWERED, AGAIN],
        # It was stopped meanwhile.
        [replace(GOOD, seconds=24), replace(KILLED, fault="stop_nginx_worker", begin=45)],
        # The gateway has not noticed the fault yet.
        [replace(GOOD, seconds=5), replace(STOPPED, begin=45)],
        # More came than fits.
        [replace(KILLED, fault="crowd"), replace(GOOD, status=429, reason="TooManyRequests")],
        [replace(KILLED, fault="crowd"),
         replace(GOOD, statuses=(200, 429, 503), status=503, reason="Unavailable")],
        # Its body was still being sent when they came.
        [replace(KILLED, fault="crowd"),
         replace(GOOD, time=40, sent=9.5, status=429, reason="TooManyRequests")],
        [Ended(time=51, replica=0, status=1), replace(KILLED, fault="kill_java", replica=0)],
        using(1, megabytes_per_minute=1, per_minute=0.5),
        # A process that has just started takes what it needs.
        [replace(usage, time=usage.time / 5) for usage in using(1, megabytes_per_minute=500)],
        # Two processes are no growth of one.
        [*using(1, 0), *(replace(usage, time=usage.time + 600, rss=usage.rss * 2)
                         for usage in using(2, 0))],
        # Not possible on this machine.
        [replace(KILLED, fault="full_disk", recovered=None, possible=False)],
        [replace(KILLED, fault="kill_launcher", cleared=3)],
        # Its alert was raised; nobody looked; it was too short for one; it needs none.
        [MONITORED, STOPPED, DOWN],
        [STOPPED],
        [MONITORED, replace(STOPPED, seconds=2)],
        [MONITORED, KILLED],
        # It was back before anybody could see that it was down.
        [MONITORED, JAVA],
        # An alert may come after its fault, even long after.
        [MONITORED, STOPPED, replace(DOWN, begin=60, end=65)],
        [MONITORED, STOPPED, DOWN, replace(DOWN, begin=300, end=310)],
        # A worker that has just started grows.
        [MONITORED, replace(DOWN, alert="ClassifierWorkerMemoryGrowing")],
        # So many requests failed.
        [MONITORED, KILLED, replace(DOWN, alert="ClassifierErrors", replica=-1, begin=52)],
    ],
)  # fmt: skip
def test_promises_that_were_kept(records: list[Record]) -> None:
    assert broken(*records) == []


@pytest.mark.parametrize(
    ("rule", "records"),
    [
        ("lost", [UNANSWERED]),
        ("lost", [UNANSWERED, KILLED]),  # never tried again
        ("lost", [UNANSWERED, AGAIN]),  # no fault explains it
        ("lost", [UNANSWERED, AGAIN, replace(KILLED, begin=90, end=91, recovered=92)]),
        ("lost", [UNANSWERED, AGAIN, replace(KILLED, fault="kill_worker", replica=0)]),
        ("answered twice", [replace(GOOD, surplus=120)]),
        ("answered twice", [GOOD, replace(GOOD, request=3)]),
        ("wrong answer", [replace(GOOD, answered="green 1.jpg")]),
        ("wrong answer", [replace(GOOD, answered="red 2.jpg")]),
        ("wrong answer", [replace(GOOD, answered="")]),
        ("wrong status", [replace(GOOD, status=400, reason="NoImage")]),
        ("wrong status", [replace(REFUSED, status=200)]),
        ("undeserved 5xx", [replace(GOOD, status=503, reason="Unavailable")]),
        ("undeserved 5xx", [replace(REFUSED, status=500, reason="ModelFailed")]),
        ("undeserved 5xx", [replace(GOOD, status=500, reason="x"), replace(KILLED, fault="crowd")]),
        ("no reason", [replace(REFUSED, reason="")]),
        ("slow", [replace(GOOD, seconds=24)]),
        ("held up", [replace(GOOD, seconds=5), STOPPED]),
        ("not recovered", [replace(KILLED, recovered=None)]),
        ("not recovered", [replace(KILLED, recovered=90)]),
        ("orphans", [replace(KILLED, fault="kill_launcher", cleared=15)]),
        ("ended", [Ended(time=51, replica=0, status=1)]),
        ("ended", [Ended(time=51, replica=1, status=1),
                   replace(KILLED, fault="kill_java", replica=0)]),
        ("memory", using(1, megabytes_per_minute=50)),
        ("descriptors", using(1, 0, per_minute=30)),
        ("left", [Left(what="replica 0: file x")]),
        ("no alert", [MONITORED, STOPPED]),
        ("no alert", [MONITORED, STOPPED, replace(DOWN, replica=1)]),
        ("no alert", [MONITORED, STOPPED, replace(DOWN, begin=70, end=80)]),
        ("no alert", [MONITORED, STOPPED, replace(DOWN, alert="ClassifierNoWorker")]),
        ("no alert", [MONITORED, replace(JAVA, recovered=57)]),
        ("false alarm", [MONITORED, DOWN]),
        ("false alarm", [MONITORED, replace(DOWN, alert="ClassifierWorkerMemoryGrowing",
                                            state="firing")]),
        ("false alarm", [MONITORED, KILLED, replace(DOWN, begin=52)]),
        ("false alarm", [MONITORED, STOPPED, DOWN, replace(DOWN, begin=20, end=22)]),
        ("false alarm", [MONITORED, STOPPED, DOWN, replace(DOWN, alert="ClassifierUntrained")]),
    ],
)  # fmt: skip
def test_promises_that_were_broken(rule: str, records: list[Record]) -> None:
    assert broken(*records) == [rule]


def test_the_worst_case_is_named() -> None:
    slow = replace(GOOD, request=7, seconds=21.5, answer_id="c")
    [verdict] = [
        verdict
        for verdict in check(History(records=[GOOD, slow]), PROMISED)
        if verdict.rule.name == "slow"
    ]
    assert (verdict.cases, verdict.broken) == (2, [])
    assert verdict.worst is not None
    assert verdict.worst.value == 21.5
    assert "request 7, form" in verdict.worst.what


def test_a_history_is_read_as_it_was_written(tmp_path: Path) -> None:
    records: list[Record] = [
        *(GOOD, UNANSWERED, KILLED, Left(what="x"), *using(1, 1)[:1], MONITORED, DOWN)
    ]
    history = History(tmp_path / "history")
    for record in records:
        history.add(record)
    assert from_lines((tmp_path / "history").read_text().splitlines()).records == records
