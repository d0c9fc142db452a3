"""Replicas that stand in for TorchServe: what is tried again, and where."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import requests

from tests.gateway.clients import RED, SMALL, TIMEOUT, check_error
from tests.gateway.running import running
from tests.gateway.upstreams import answer_of, torchserve_that
from tests.processes import free_port, wait_for


def test_three_replicas_take_turns(tmp_path: Path) -> None:
    with ExitStack() as stack:
        replicas = [stack.enter_context(torchserve_that(answer_of(b"{}"))) for _ in range(3)]
        env = {"GATEWAY_UPSTREAMS": ",".join(replicas)}
        gateway = stack.enter_context(running(tmp_path, env))
        with requests.Session() as session:  # one connection: one of nginx's workers
            for _ in range(30):
                assert session.post(f"{gateway.url}/predict", data=SMALL).status_code == 200
        wait_for(lambda: len(gateway.lines()) == 30)
        asked = Counter(line["upstream"] for line in gateway.lines())
    assert asked == dict.fromkeys(replicas, 10)


def test_an_answer_that_breaks_off_is_asked_for_again(tmp_path: Path) -> None:
    with ExitStack() as stack:
        whole = stack.enter_context(torchserve_that(answer_of(b'{"whole":true}')))
        cut = stack.enter_context(torchserve_that(answer_of(b'{"who', length=14)))
        for upstreams, status in ((f"{cut},{whole}", 200), (cut, 503)):
            with running(tmp_path, {"GATEWAY_UPSTREAMS": upstreams}) as gateway:
                for _ in range(6):
                    answer = requests.post(f"{gateway.url}/predict", data=SMALL, timeout=TIMEOUT)
                    assert answer.status_code == status
                    if status == 503:
                        check_error(answer, 503)
                    else:
                        assert answer.json() == {"whole": True}


@pytest.mark.parametrize("size", [300_000, 5_000_000])
def test_large_answers(tmp_path: Path, size: int) -> None:
    """Of many images and classes. nginx's own buffers hold 256 KB."""
    body = b'{"padding":"' + b"x" * size + b'"}'
    with (
        torchserve_that(answer_of(body)) as upstream,
        running(tmp_path, {"GATEWAY_UPSTREAMS": upstream}) as gateway,
    ):
        for _ in range(3):
            answer = requests.post(f"{gateway.url}/predict", data=SMALL, timeout=TIMEOUT)
            assert (answer.status_code, answer.content) == (200, body)


def test_a_full_queue_is_503_with_retry_after(tmp_path: Path) -> None:
    body = b'{"code": 503, "type": "ServiceUnavailableException", "message": "Model has no worker"}'
    with ExitStack() as stack:
        upstream = stack.enter_context(torchserve_that(answer_of(body, "503 ", by_handler=False)))
        gateway = stack.enter_context(running(tmp_path, {"GATEWAY_UPSTREAMS": upstream}))
        answer = requests.post(f"{gateway.url}/predict", data=RED, timeout=TIMEOUT)
        check_error(answer, 503)
        assert answer.headers["Retry-After"] == "1"
        line = gateway.line(answer.headers["X-Request-ID"])
        assert line["upstream_status"] == "503", "one replica is not asked twice"


@pytest.mark.parametrize("status", [500, 507])
def test_worker_died_twice(tmp_path: Path, status: int) -> None:
    body = b'{"code": %d, "type": "InternalServerException", "message": "Worker died."}' % status
    died = answer_of(body, f"{status} ", by_handler=False)
    with ExitStack() as stack:
        upstream = stack.enter_context(torchserve_that(died))
        gateway = stack.enter_context(running(tmp_path, {"GATEWAY_UPSTREAMS": upstream}))
        answer = requests.post(f"{gateway.url}/predict", data=RED, timeout=TIMEOUT)
        check_error(answer, 500, "InternalError")
        line = gateway.line(answer.headers["X-Request-ID"])
        assert line["upstream_status"].count(str(status)) == 2


def test_a_failure_of_the_handler_is_not_tried_again(tmp_path: Path) -> None:
    body = b'{"status":"error","code":500,"type":"ModelFailed","message":"the model failed"}'
    with ExitStack() as stack:
        failure = answer_of(body, "500 ")
        both = [stack.enter_context(torchserve_that(failure)) for _ in range(2)]
        env = {"GATEWAY_UPSTREAMS": ",".join(both)}
        gateway = stack.enter_context(running(tmp_path, env))
        reply = requests.post(f"{gateway.url}/predict", data=SMALL, timeout=TIMEOUT)
        assert (reply.status_code, reply.content) == (500, body)
        line = gateway.line(reply.headers["X-Request-ID"])
        assert line["upstream_status"] == "500"


def test_nothing_is_tried_again_at_a_replica_that_is_left_out(tmp_path: Path) -> None:
    """The queue of the only one that answers is full."""
    full = answer_of(b'{"code":503,"message":"no worker"}', "503 ", by_handler=False)
    with (
        torchserve_that(full) as busy,
        torchserve_that(None) as hung,
        running(tmp_path, {"GATEWAY_UPSTREAMS": f"{busy},{hung}"}) as gateway,
    ):
        wait_for(lambda: gateway.lines("replica_left_out"))
        time.sleep(1)  # until nginx knows
        for _ in range(4):
            answer = requests.post(f"{gateway.url}/predict", data=SMALL, timeout=TIMEOUT)
            check_error(answer, 503)
            assert answer.elapsed.total_seconds() < 2
        wait_for(lambda: len(gateway.lines()) == 4)
        assert {line["upstream"] for line in gateway.lines()} == {busy}


def test_a_worker_of_nginx_that_is_killed_takes_no_places_with_it(tmp_path: Path) -> None:
    with torchserve_that(None) as upstream, ThreadPoolExecutor(4) as pool:
        env = {
            "GATEWAY_UPSTREAMS": upstream,
            "GATEWAY_MAX_CONCURRENT": "2",
            "GATEWAY_RESPONSE_TIMEOUT_SECONDS": "5",
        }
        with running(tmp_path, env) as gateway:
            url = f"{gateway.url}/predict"

            def ask() -> int:
                """The status, or 0 without an answer."""
                try:
                    return requests.post(url, data=SMALL, timeout=TIMEOUT).status_code
                except requests.RequestException:
                    return 0

            held = [pool.submit(ask) for _ in range(2)]
            time.sleep(2)  # they are under way
            assert ask() == 429
            nginx, *_ = psutil.Process(gateway.process.pid).children()
            for worker in nginx.children():
                worker.kill()
            assert [one.result() for one in held] == [0, 0]
            wait_for(lambda: len(nginx.children()) >= 2)  # there are others
            time.sleep(2)
            assert ask() == 504


def test_all_replicas_dead_is_503_at_once(tmp_path: Path) -> None:
    env = {
        "GATEWAY_UPSTREAMS": f"127.0.0.1:{free_port()},127.0.0.1:{free_port()}",
        "GATEWAY_MANAGEMENT": f"127.0.0.1:{free_port()},127.0.0.1:{free_port()}",
    }
    with running(tmp_path, env) as gateway:
        for _ in range(5):
            answer = requests.post(f"{gateway.url}/predict", data=SMALL, timeout=TIMEOUT)
            check_error(answer, 503)
            assert answer.headers["Retry-After"] == "1"
            assert answer.elapsed.total_seconds() < 2
        state = requests.get(f"{gateway.url}/health", timeout=TIMEOUT).json()
        assert state["replicas"] == {"ready": 0, "total": 2}
