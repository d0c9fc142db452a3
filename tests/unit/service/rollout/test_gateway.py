from service.rollout.gateway import parse
from service.rollout.judgement import Counts

PAGE = """\
gateway_connections{state="reading"} 0
# TYPE gateway_rollout_step gauge
gateway_rollout_step 3
gateway_rollout_in_flight{version="1.0"} 2
gateway_rollout_requests_total{version="2.0"} 7
gateway_rollout_live_total{version="2.0"} 5
gateway_rollout_errors_total{version="2.0"} 1
gateway_rollout_seconds_bucket{version="2.0",le="0.004000"} 4
gateway_rollout_seconds_bucket{version="2.0",le="+Inf"} 6
"""


def test_the_page_says_what_each_version_did() -> None:
    page = parse(PAGE)
    assert (page.step, page.in_flight) == (3, {"1.0": 2})
    seconds = {0.004: 4, float("inf"): 6}
    assert page.of("2.0") == Counts(requests=7, live=5, errors=1, seconds=seconds)
    assert page.of("1.0") == Counts()


def test_a_gateway_without_rollouts_says_no_step() -> None:
    assert parse('gateway_connections{state="reading"} 0\n').step is None
