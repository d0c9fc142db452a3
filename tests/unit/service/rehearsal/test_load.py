"""The account of a rehearsal's requests, and what counts as a failure."""

from dataclasses import replace

from service.load.measurement import Sample
from service.rehearsal.load import account
from service.rehearsal.scenarios import has_failed, turns_of


def test_every_request_is_accounted_for() -> None:
    outcomes = ["ok"] * 7 + ["refused", "WrongClass", "ServerDisconnectedError"]
    samples = [Sample(5.0 + n, 5.0 + n, 5.2 + n, outcome) for n, outcome in enumerate(outcomes)]
    samples.append(Sample(15.0, 15.0))  # never answered
    samples += [Sample(25.0 + n / 10, 25.0, 25.1 + n / 10, "ok") for n in range(10)]
    found = account(samples, {"503 no replica": 1})
    assert (found.sent, found.right, found.refused) == (21, 17, {"503 no replica": 1})
    assert found.failed == {"WrongClass": 1, "ServerDisconnectedError": 1, "unanswered": 1}
    assert found.sent == found.right + sum(found.refused.values()) + sum(found.failed.values())
    assert found.held == 1 / 3  # of the windows of 10 s: the first two have what was not right
    assert found.p50_ms is not None
    assert round(found.p50_ms) == 100


def test_what_counts_as_a_failure() -> None:
    right = account([Sample(0, 0, 0.1, "ok")], {})
    limited = account([Sample(0, 0, 0.1, "refused")], {"429 64 at once": 1})
    full = account([Sample(0, 0, 0.1, "refused")], {"503 no replica": 1})
    lost = account([Sample(0, 0, 0.1, "ClientOSError")], {})
    for name, expected in (("rollout 1", [False, False, True, True]), ("day 1", [False] * 3)):
        accounts = [right, limited, full, lost][: len(expected)]
        assert [has_failed(name, one) for one in accounts] == expected
    assert has_failed("day 1", replace(lost, sent=2, right=1))


def test_turns() -> None:
    assert turns_of([2]) == 0
    assert turns_of([2, 4, 6, 5, 4, 2]) == 1  # a day
    assert turns_of([2, 3, 2, 3, 2]) == 3  # flapping
