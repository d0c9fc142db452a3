"""Health, info and metrics."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.gateway.clients import RED, TIMEOUT, check_error
from tests.gateway.conftest import Served
from tests.gateway.running import in_front_of, running, settings, variables
from tests.gateway.upstreams import answer_of, http_server, torchserve_that
from tests.processes import wait_for

READY = b'[{"workers": [{"status": "READY"}]}]'  # what the management API says


def test_health(gateway: Served) -> None:
    answer = requests.get(f"{gateway.url}/health", timeout=TIMEOUT)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json() == {
        "status": "healthy",
        "model": "mobilenet_v2",
        "replicas": {"ready": 1, "total": 1},
    }
    assert requests.get(f"{gateway.url}/livez", timeout=TIMEOUT).json() == {"status": "alive"}


def test_health_asks_management_once_a_second(gateway: Served, tmp_path: Path) -> None:
    under_way, most, calls = 0, 0, 0

    def reply(_: object) -> bytes:
        nonlocal under_way, most, calls
        calls, under_way = calls + 1, under_way + 1
        most = max(most, under_way)
        time.sleep(0.2)
        under_way -= 1
        return READY

    with http_server(reply) as port, ThreadPoolExecutor(32) as pool:
        env = settings([gateway.server], management=f"127.0.0.1:{port}")
        with running(tmp_path, env) as other:
            started = time.monotonic()

            def poll(_: int) -> int:
                return requests.get(f"{other.url}/health", timeout=TIMEOUT).status_code

            statuses = set()
            while time.monotonic() - started < 3:
                statuses |= set(pool.map(poll, range(32)))
            seconds = time.monotonic() - started
    assert statuses == {200}
    assert 2 <= calls <= seconds + 1
    assert most == 1


def test_health_without_torchserve(tmp_path: Path) -> None:
    dead = "127.0.0.1:9,127.0.0.2:9"
    env = variables(upstreams=dead, management=dead, models="resnet50,mobilenet_v2")
    with running(tmp_path, env) as gateway:
        answer = requests.get(f"{gateway.url}/health", timeout=TIMEOUT)
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "1"
        assert answer.json() == {
            "status": "unhealthy",
            "model": "resnet50",
            "replicas": {"ready": 0, "total": 2},
            "missing": [
                "resnet50: no replica has a READY worker",
                "mobilenet_v2: no replica has a READY worker",
            ],
        }
        assert requests.get(f"{gateway.url}/livez", timeout=TIMEOUT).status_code == 200
        check_error(requests.get(f"{gateway.url}/info", timeout=TIMEOUT), 503)
        for _ in range(3):
            answer = requests.post(f"{gateway.url}/predict", data=RED, timeout=TIMEOUT)
            check_error(answer, 503)
            assert answer.headers["Retry-After"] == "1"
            assert answer.elapsed.total_seconds() < 1
            assert gateway.line(answer.headers["X-Request-ID"])["status"] == 503


def test_a_service_that_cannot_answer_is_not_healthy(tmp_path: Path) -> None:
    """Its workers are READY, and every prediction fails."""
    error = answer_of(b"{}", "500 ", by_handler=False)
    with (
        torchserve_that(answer_of(READY)) as fine,
        in_front_of(tmp_path, error, management=fine) as (gateway, [failing]),
    ):

        def state() -> requests.Response:
            return requests.get(f"{gateway.url}/health", timeout=TIMEOUT)

        wait_for(lambda: state().status_code == 503)
        why = f"{failing}: predictions of mobilenet_v2 fail with status 500"
        assert state().json()["missing"] == ["no replica answers a prediction"]
        assert state().json()["left_out"] == [why]
        page = requests.get(f"{gateway.url}/metrics", timeout=TIMEOUT).text
        assert f'gateway_replica_in_use{{replica="{failing}"}} 0' in page


def of_any_worker(info: dict[str, Any]) -> dict[str, Any]:
    """Without what differs between two workers."""
    return info | {"certificate": info["certificate"] | {"seconds": 0}}


def test_info(gateway: Served) -> None:
    answer = requests.get(f"{gateway.url}/info", timeout=TIMEOUT)
    assert answer.headers["Content-Type"] == "application/json"
    assert of_any_worker(answer.json()) == of_any_worker(gateway.server.info())
    assert answer.json()["classes"] == 3
    named = requests.get(f"{gateway.url}/info?model=mobilenet_v2", timeout=TIMEOUT)
    assert of_any_worker(named.json()) == of_any_worker(answer.json())
    check_error(requests.get(f"{gateway.url}/info?model=unknown", timeout=TIMEOUT), 404)
    check_error(requests.get(f"{gateway.url}/info?model=..", timeout=TIMEOUT), 404)


@pytest.mark.parametrize("status", ["UNLOADING", "READY"])
def test_info_does_not_wait_for_a_replica_that_loads_or_hangs(tmp_path: Path, status: str) -> None:
    ended = threading.Event()

    def silent(request: BaseHTTPRequestHandler) -> bytes:
        if "customized" in request.path:
            ended.wait(TIMEOUT)
        return READY.replace(b"READY", status.encode())

    def whole(request: BaseHTTPRequestHandler) -> bytes:
        described = b'[{"customizedMetadata": {"model": "mobilenet_v2"}}]'
        return described if "customized" in request.path else READY

    with http_server(silent) as first, http_server(whole, ("127.0.0.2", 0)) as second:
        env = variables(
            upstreams="127.0.0.1:9,127.0.0.2:9",
            management=f"127.0.0.1:{first},127.0.0.2:{second}",
            response_timeout_seconds="12",
        )
        with running(tmp_path, env) as gateway:
            answer = requests.get(f"{gateway.url}/info", timeout=TIMEOUT)
            ended.set()
    assert answer.json() == {"model": "mobilenet_v2"}
    assert answer.elapsed.total_seconds() < 8  # a quarter of the time that a request has is 3 s


def test_metrics_are_for_allowed_addresses(gateway: Served, tmp_path: Path) -> None:
    page = requests.get(f"{gateway.url}/metrics", timeout=TIMEOUT)
    assert page.headers["Content-Type"].startswith("text/plain")
    assert re.search(r'^gateway_connections\{state="writing"\} [1-9]', page.text, re.MULTILINE)
    env = settings([gateway.server], metrics_allow="10.0.0.0/8")
    with running(tmp_path, env) as other:
        check_error(requests.get(f"{other.url}/metrics", timeout=TIMEOUT), 403)
