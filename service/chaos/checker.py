"""Decides from a history alone whether every promise was kept."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from service.chaos.history import Alert, Attempt, Ended, Fault, History, Left, Monitored, Usage
from service.chaos.schedule import COMMON, KINDS, PATIENT

EDGE_SECONDS = 1.0  # by which a fault is noticed earlier or later than it was injected
HELD_UP_SECONDS = 4.5  # less than the gateway gives a replica until it asks another
WARM_SECONDS = 60.0  # of a process, in which it takes what it needs
GROWTH_SECONDS = 300.0  # after that, in which a heap of Java's may still fill that has a bound
ALERT_SECONDS = 10.0  # after a recovery, in which the alert of the fault may still come


class Case(NamedTuple):
    """Something to which a rule applies: its value, and which it is."""

    value: float
    what: str


@dataclass(frozen=True)
class Rule:
    """A promise: no case has a value above the limit."""

    name: str
    promise: str
    limit: float
    unit: str
    cases: Callable[[History], Iterator[Case]]


@dataclass(frozen=True)
class Verdict:
    """What a rule found: how many cases there were, the worst of them, and those that break it."""

    rule: Rule
    cases: int
    worst: Case | None
    broken: Sequence[Case]


def check(history: History, promised_seconds: float) -> list[Verdict]:
    """A verdict on each rule. `promised_seconds` is the gateway's limit for an answer."""
    verdicts = []
    for rule in rules(promised_seconds):
        cases = list(rule.cases(history))
        broken = [case for case in cases if case.value > rule.limit]
        worst = max(cases, key=lambda case: case.value, default=None)
        verdicts.append(Verdict(rule, len(cases), worst, broken))
    return verdicts


def rules(promised_seconds: float) -> list[Rule]:
    """The one table of promises."""
    answer = "of the answer, after the body was sent and without the time that nginx was stopped"
    return [
        Rule("lost", "every request gets an answer", 0, "", find_lost),
        Rule("answered twice", "nothing follows an answer", 0, "", find_twice),
        Rule("wrong answer", "class and file name are the image's own", 0, "", find_wrong),
        Rule("wrong status", "only what is wrong is refused", 0, "", find_status),
        Rule("undeserved 5xx", "one healthy replica is enough", 0, "", find_undeserved),
        Rule("no reason", "a refusal says why", 0, "", find_unreasoned),
        Rule("slow", answer, promised_seconds + 2, "s", find_slow),
        Rule("held up", "likewise, once a fault is noticed", HELD_UP_SECONDS, "s", find_held_up),
        Rule("not recovered", "in shares of the fault's own limit", 1, "", find_unrecovered),
        Rule("orphans", "of a launcher that was killed", 10, "s", find_orphans),
        Rule("ended", "no launcher ends unless a fault ends it", 0, "", find_ended),
        Rule("memory", "growth of a process that has warmed up", 10, "MB/min", find_memory),
        Rule("descriptors", "likewise", 5, "/min", find_descriptors),
        Rule("left", "processes, files and ports at the end", 0, "", find_left),
        Rule("no alert", "each fault raises its alert, with --prometheus", 0, "", find_unraised),
        Rule("false alarm", "no alert that no fault explains, likewise", 0, "", find_false_alarms),
    ]  # fmt: skip


def find_lost(history: History) -> Iterator[Case]:
    """A request without an answer; and an attempt that no fault may have cut off."""
    attempts = defaultdict[int, list[Attempt]](list)
    for attempt in history.of(Attempt):
        if attempt.statuses:
            attempts[attempt.request].append(attempt)
    for tried in attempts.values():
        last = tried[-1]
        yield Case(not last.status, f"{_named(last)}: {last.error}")
        for attempt in tried[:-1]:
            cut = _during(history, attempt, lambda fault: KINDS[fault.fault].cuts)
            yield Case(not cut, f"{_named(attempt)}: {attempt.error}")


def find_twice(history: History) -> Iterator[Case]:
    seen: dict[str, Attempt] = {}
    for attempt in _answered(history):
        again = seen.get(attempt.answer_id) if attempt.answer_id else None
        yield Case(attempt.surplus, f"{_named(attempt)}: {attempt.surplus} bytes more")
        if again:
            yield Case(1, f"{_named(attempt)}: the answer of {_named(again)}")
        seen[attempt.answer_id] = attempt


def find_wrong(history: History) -> Iterator[Case]:
    for attempt in _answered(history):
        if attempt.right and attempt.status == 200:
            wrong = attempt.answered != attempt.right
            yield Case(wrong, f"{_named(attempt)}: {attempt.right!r} got {attempt.answered!r}")


def find_status(history: History) -> Iterator[Case]:
    for attempt in _answered(history):
        if attempt.status < 500:
            sheds = attempt.status == 429 and _sheds(history, attempt)
            yield Case(attempt.status not in attempt.statuses and not sheds, _told(attempt))


def find_undeserved(history: History) -> Iterator[Case]:
    for attempt in _answered(history):
        sheds = attempt.status == 503 and _sheds(history, attempt)
        yield Case(attempt.status >= 500 and not sheds, _told(attempt))


def find_unreasoned(history: History) -> Iterator[Case]:
    for attempt in _answered(history):
        if attempt.status >= 400:
            yield Case(not attempt.reason, _told(attempt))


def find_slow(history: History) -> Iterator[Case]:
    for attempt in _answered(history):
        yield Case(round(attempt.seconds - _stopped(history, attempt), 1), _named(attempt))


def find_held_up(history: History) -> Iterator[Case]:
    """What begins when a fault must have been noticed is not held up by it."""
    for attempt in _answered(history):
        for fault in history.of(Fault):
            if fault.begin + KINDS[fault.fault].noticed <= attempt.time <= fault.end:
                yield Case(round(attempt.seconds, 1), f"{_named(attempt)}, in {fault.fault}")


def find_unrecovered(history: History) -> Iterator[Case]:
    for fault in history.of(Fault):
        if fault.possible:
            limit, end = KINDS[fault.fault].recovery, fault.recovered
            share = float("inf") if end is None else round((end - fault.end) / limit, 2)
            yield Case(share, f"{fault.fault} at {fault.begin:.1f} s: {fault.detail}")


def find_orphans(history: History) -> Iterator[Case]:
    for fault in history.of(Fault):
        if fault.cleared is not None:
            yield Case(fault.cleared, f"{fault.fault} at {fault.begin:.1f} s")


def find_ended(history: History) -> Iterator[Case]:
    for ended in history.of(Ended):
        expected = any(
            KINDS[fault.fault].ends
            and fault.replica == ended.replica
            and fault.begin <= ended.time <= _over(fault)
            for fault in history.of(Fault)
        )
        who = f"replica {ended.replica}" if ended.replica >= 0 else "the gateway"
        yield Case(not expected, f"{who} at {ended.time:.1f} s with status {ended.status}")


def find_memory(history: History) -> Iterator[Case]:
    return _growth(history, lambda usage: usage.rss / 2**20)


def find_descriptors(history: History) -> Iterator[Case]:
    return _growth(history, lambda usage: usage.descriptors)


def find_left(history: History) -> Iterator[Case]:
    for left in history.of(Left):
        yield Case(1, left.what)


def find_unraised(history: History) -> Iterator[Case]:
    for fault in history.of(Fault) if history.of(Monitored) else []:
        kind = KINDS[fault.fault]
        lasted = _over(fault) - fault.begin if kind.is_momentary else fault.seconds
        for name, seconds in kind.alerts.items():
            if fault.possible and lasted >= seconds:
                last = _over(fault) + ALERT_SECONDS
                raised = any(
                    alert.alert == name
                    and alert.replica in (-1, fault.replica)
                    and fault.begin <= alert.end
                    and alert.begin <= last
                    for alert in history.of(Alert)
                )
                yield Case(not raised, f"{name} for {fault.fault} at {fault.begin:.1f} s")


def find_false_alarms(history: History) -> Iterator[Case]:
    """A fault may also be the cause of what is raised long after it."""
    for alert in history.of(Alert):
        if alert.alert in PATIENT and alert.state == "pending":
            continue
        explained = any(
            fault.begin - EDGE_SECONDS <= alert.begin
            and alert.alert in {*KINDS[fault.fault].alerts, *KINDS[fault.fault].may_raise, *COMMON}
            for fault in history.of(Fault)
        )
        what = f"{alert.alert} was {alert.state} from {alert.begin:.0f} to {alert.end:.0f} s"
        yield Case(not explained, what)


def _growth(history: History, value: Callable[[Usage], float]) -> Iterator[Case]:
    """The slope of each process that lived for long enough, a minute, by least squares."""
    series = defaultdict[tuple[str, int], list[Usage]](list)
    for usage in history.of(Usage):
        series[usage.process, usage.pid].append(usage)
    for (process, pid), usages in series.items():
        warm = [usage for usage in usages if usage.time - usages[0].time >= WARM_SECONDS]
        if warm and warm[-1].time - warm[0].time >= GROWTH_SECONDS:
            slope = _slope([(usage.time / 60, value(usage)) for usage in warm])
            yield Case(round(slope, 2), f"{process} ({pid})")


def _slope(points: Sequence[tuple[float, float]]) -> float:
    x0 = sum(x for x, _ in points) / len(points)
    y0 = sum(y for _, y in points) / len(points)
    return sum((x - x0) * (y - y0) for x, y in points) / sum((x - x0) ** 2 for x, _ in points)


def _answered(history: History) -> Iterator[Attempt]:
    return (attempt for attempt in history.of(Attempt) if attempt.statuses and attempt.status)


def _stopped(history: History, attempt: Attempt) -> float:
    """For how long nginx was stopped while an attempt was under way, in seconds."""
    return sum(
        fault.end - fault.begin
        for fault in history.of(Fault)
        if KINDS[fault.fault].stalls and _overlaps(fault, attempt)
    )


def _sheds(history: History, attempt: Attempt) -> bool:
    return _during(history, attempt, lambda fault: KINDS[fault.fault].sheds)


def _during(history: History, attempt: Attempt, allows: Callable[[Fault], bool]) -> bool:
    """Whether an attempt was under way while there was a fault that allows what happened."""
    faults = (fault for fault in history.of(Fault) if allows(fault))
    return any(_overlaps(fault, attempt) for fault in faults)


def _overlaps(fault: Fault, attempt: Attempt) -> bool:
    begin, end = fault.begin - EDGE_SECONDS, _over(fault) + EDGE_SECONDS
    return begin <= attempt.end and attempt.time <= end


def _over(fault: Fault) -> float:
    return max(fault.end, fault.recovered or float("inf"))


def _named(attempt: Attempt) -> str:
    again = f" (attempt {attempt.attempt})" if attempt.attempt > 1 else ""
    return f"request {attempt.request}{again}, {attempt.form}, at {attempt.time:.1f} s"


def _told(attempt: Attempt) -> str:
    return f"{_named(attempt)}: {attempt.status} {attempt.reason}"
