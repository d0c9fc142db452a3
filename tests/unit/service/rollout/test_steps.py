from service.rollout.judgement import Counts
from service.rollout.steps import Pace, make_steps


def test_steps_begin_with_the_old_version_alone_and_the_shadow() -> None:
    steps = make_steps((1, 50, 100), shadow=10)
    assert [(step.number, step.percent, step.shadow) for step in steps] == [
        (1, 0, 0),
        (2, 0, 10),
        (3, 1, 10),
        (4, 50, 10),
        (5, 100, 0),  # there is nothing to compare with
    ]
    assert [str(step) for step in steps][:3] == [
        "old version alone",
        "shadow",
        "1 % of the requests",
    ]


def test_without_a_shadow_there_is_no_step_of_it() -> None:
    assert [step.percent for step in make_steps((100,), shadow=0)] == [0, 100]


def test_a_step_needs_time_and_requests_of_the_version_that_it_judges() -> None:
    alone, last = make_steps((100,), shadow=0)
    pace = Pace(seconds=10, requests=100, timeout=60)
    few, many = Counts(requests=99), Counts(requests=100)
    assert pace.is_over(alone, few, many, 10)
    assert not pace.is_over(last, few, many, 10)
    assert pace.is_over(last, many, few, 10)
    assert not pace.is_over(last, many, few, 9)
    assert pace.is_late(60)
    assert not pace.is_late(59)
