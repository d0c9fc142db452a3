"""Pace against a simulated server: as many at once as it takes, and no request too early."""

import heapq

import pytest

from service.bulk.pace import LONGEST_PAUSE, Pace

SERVICE = 0.1  # seconds of an answer; a refusal comes at once


def simulate(pace: Pace, capacity: list[tuple[float, int]], end: float) -> tuple[list[int], int]:
    """A server that has room for so many requests from each of these times on.

    Returns how many were under way when each request was sent, and how many were refused.
    """
    now, refused = 0.0, 0
    flying: list[tuple[float, float, bool]] = []  # when it ends, when it was sent, whether answered
    seen = []
    while now < end:
        room = max(step for step in capacity if step[0] <= now)[1]
        while len(flying) < pace.allowed and not pace.pause(now):
            accepted = sum(answered for *_, answered in flying) < room
            heapq.heappush(flying, (now + (SERVICE if accepted else 0.001), now, accepted))
            seen.append(len(flying))
        if not flying:
            now += pace.pause(now)
            continue
        now, sent, accepted = heapq.heappop(flying)
        if accepted:
            pace.answered()
        else:
            refused += 1
            pace.refused(sent, now, None)
    return seen, refused


def test_it_grows_to_the_most_if_the_server_takes_all() -> None:
    seen, refused = simulate(Pace(16, 60), [(0, 1000)], 10)
    assert seen[0] == 1
    assert seen[-1] == max(seen) == 16
    assert refused == 0


@pytest.mark.parametrize("room", [1, 4, 20])
def test_it_stays_about_where_the_server_refuses(room: int) -> None:
    seen, refused = simulate(Pace(64, 60), [(0, room)], 60)
    assert max(seen) <= room + 1 + room // 2
    late = seen[len(seen) // 2 :]
    assert room / 2 <= sum(late) / len(late) <= room + 1
    assert refused < len(seen) / 2 if room == 1 else refused < len(seen) / 10


def test_it_follows_a_server_that_becomes_smaller_and_larger() -> None:
    pace = Pace(32, 60)
    simulate(pace, [(0, 32)], 20)
    assert pace.allowed == 32
    simulate(pace, [(0, 4)], 5)
    assert pace.allowed <= 5
    simulate(pace, [(0, 32)], 30)
    assert pace.allowed == 32


def grown(to: int) -> Pace:
    pace = Pace(to, 60)
    while pace.allowed < to:
        pace.answered()
    return pace


def test_the_refusals_of_one_round_halve_it_once() -> None:
    pace = grown(16)
    for now in (1.0, 1.1, 1.2):
        pace.refused(0.5, now, None)
    assert pace.allowed == 8
    pace.refused(1.3, 1.4, None)
    assert pace.allowed == 4


def test_retry_after_is_waited_for_by_all() -> None:
    pace = grown(16)
    pace.refused(0.0, 1.0, 5.0)
    pace.refused(0.0, 2.0, 2.0)  # the longer one counts
    assert pace.pause(3.0) == 3.0
    pace.answered()
    assert pace.pause(3.0) == 3.0
    assert pace.pause(6.0) == 0


def test_pauses_grow_and_are_bounded() -> None:
    pace, now, pauses = Pace(16, 1e6), 0.0, []
    for _ in range(12):
        pace.refused(now, now := now + 0.001, None)
        pauses.append(pace.pause(now))
        now += pauses[-1] + 0.001
    assert pauses[0] <= 0.1
    assert LONGEST_PAUSE / 2 <= pauses[-1] <= LONGEST_PAUSE


def test_a_server_is_lost_after_refusals_alone() -> None:
    pace = Pace(16, 10)
    assert pace.refused(0, 1, None)
    assert not pace.refused(5, 6, None)
    assert not pace.is_lost(9)
    assert pace.is_lost(12)
    pace.answered()
    assert not pace.is_lost(12)
    pace.refused(12, 13, 3600)
    assert pace.is_lost(13), "it asks to wait longer than that"
