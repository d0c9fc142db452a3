"""Jobs that cannot be reached: what clients and Prometheus are told."""

from pathlib import Path

import requests

from tests.gateway.clients import check_error
from tests.lifecycle.conftest import RedisServer
from tests.lifecycle.jobs import TIMEOUT, Served, serving_jobs, worker_of
from tests.processes import wait_for


def has_jobs(served: Served) -> bool:
    page = requests.get(f"{served.gateway.url}/metrics", timeout=TIMEOUT).text
    assert "# TYPE gateway_jobs_up gauge" in page
    return "gateway_jobs_up 1" in page


def test_jobs_that_are_down(redis_server: RedisServer, tmp_path: Path) -> None:
    with serving_jobs(tmp_path, redis_server) as served:
        assert has_jobs(served)

        redis_server.kill()
        assert not has_jobs(served)
        redis_server.start()
        wait_for(lambda: has_jobs(served), TIMEOUT)

        worker_of(served.gateway).kill()
        answer = served.alice.ask("POST", files={"file": b"one"})
        check_error(answer, 503)
        assert answer.json()["message"] == "the jobs cannot be reached now; try again"
        assert not has_jobs(served)
        wait_for(lambda: has_jobs(served), TIMEOUT)
