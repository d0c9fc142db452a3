"""Replicas that stand in for TorchServe: what is tried again, and where."""

import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.gateway.clients import RED, SMALL, TIMEOUT, check_error
from tests.gateway.running import in_front_of, kill, running, variables
from tests.gateway.upstreams import answer_of, torchserve_that
from tests.processes import wait_for


def test_three_replicas_take_turns(tmp_path: Path) -> None:
    with in_front_of(tmp_path, *[answer_of(b"{}")] * 3) as (gateway, replicas):
        with requests.Session() as session:  # one connection: one of nginx's workers
            for _ in range(30):
                assert session.post(f"{gateway.url}/predict", data=SMALL).status_code == 200
        wait_for(lambda: len(gateway.lines()) == 30)
        asked = Counter(line["upstream"] for line in gateway.lines())
    assert asked == dict.fromkeys(replicas, 10)


def test_an_answer_that_breaks_off_is_asked_for_again(tmp_path: Path) -> None:
    cut, whole = answer_of(b'{"who', length=14), answer_of(b'{"whole":true}')
    with in_front_of(tmp_path, cut, whole) as (gateway, _):
        for _ in range(6):
            answer = requests.post(f"{gateway.url}/predict", data=SMALL, timeout=TIMEOUT)
            assert (answer.status_code, answer.json()) == (200, {"whole": True})
    with in_front_of(tmp_path, cut) as (gateway, _):
        check_error(requests.post(f"{gateway.url}/predict", data=SMALL, timeout=TIMEOUT), 503)


@pytest.mark.parametrize("size", [300_000, 5_000_000])
def test_large_answers(tmp_path: Path, size: int) -> None:
    """Of many images and classes. nginx's own buffers hold 256 KB."""
    body = b'{"padding":"' + b"x" * size + b'"}'
    with in_front_of(tmp_path, answer_of(body)) as (gateway, _):
        for _ in range(3):
            answer = requests.post(f"{gateway.url}/predict", data=SMALL, timeout=TIMEOUT)
            assert (answer.status_code, answer.content) == (200, body)


@pytest.mark.parametrize(
    ("replicas", "status", "by_handler", "expected", "type_name", "attempts"),
    [
        (1, 503, False, 503, "Unavailable", 1),  # a full queue: one replica is not asked twice
        (1, 500, False, 500, "InternalError", 2),  # a worker died
        (1, 507, False, 500, "InternalError", 2),
        (2, 500, True, 500, "ModelFailed", 1),  # another replica's model would fail as well
        (2, 504, True, 504, "ModelFailed", 1),  # nobody waits for it any more
        (2, 504, False, 504, "Timeout", 2),
    ],
)
def test_what_is_tried_again(
    tmp_path: Path,
    replicas: int,
    status: int,
    by_handler: bool,
    expected: int,
    type_name: str,
    attempts: int,
) -> None:
    body = b'{"status":"error","code":%d,"type":"ModelFailed","message":"failed"}' % status
    answers = [answer_of(body, f"{status} ", by_handler=by_handler)] * replicas
    with in_front_of(tmp_path, *answers) as (gateway, _):
        answer = requests.post(f"{gateway.url}/predict", data=RED, timeout=TIMEOUT)
        check_error(answer, expected, type_name)
        assert answer.headers.get("Retry-After") == ("1" if expected == 503 else None)
        asked = gateway.line(answer.headers["X-Request-ID"])["upstream_status"]
        assert asked.count(str(status)) == attempts


def test_nothing_is_tried_again_at_a_replica_that_is_left_out(tmp_path: Path) -> None:
    """The queue of the only one that answers is full."""
    full = answer_of(b'{"code":503,"message":"no worker"}', "503 ", by_handler=False)
    with in_front_of(tmp_path, full, None) as (gateway, [busy, silent]):

        def of_predictions() -> list[dict[str, Any]]:
            return [line for line in gateway.lines() if line["path"] == "/predict"]

        known = f'gateway_replica_in_use{{replica="{silent}"}} 0'
        wait_for(lambda: known in requests.get(f"{gateway.url}/metrics", timeout=TIMEOUT).text)
        for _ in range(4):
            answer = requests.post(f"{gateway.url}/predict", data=SMALL, timeout=TIMEOUT)
            check_error(answer, 503)
            assert answer.elapsed.total_seconds() < 2
        wait_for(lambda: len(of_predictions()) == 4)
        assert {line["upstream"] for line in of_predictions()} == {busy}


def test_a_worker_of_nginx_that_is_killed_takes_no_places_with_it(tmp_path: Path) -> None:
    started = in_front_of(tmp_path, None, max_concurrent="2", response_timeout_seconds="5")
    with started as (gateway, _), ThreadPoolExecutor(2) as pool:

        def ask() -> int:
            """The status, or 0 without an answer."""
            try:
                url = f"{gateway.url}/predict"
                return requests.post(url, data=SMALL, timeout=TIMEOUT).status_code
            except requests.RequestException:
                return 0

        held = [pool.submit(ask) for _ in range(2)]
        time.sleep(2)  # they are under way
        assert ask() == 429
        nginx, *_ = psutil.Process(gateway.process.pid).children()
        before = nginx.children()
        kill(*(worker.pid for worker in before))
        assert [one.result() for one in held] == [0, 0]
        wait_for(lambda: set(nginx.children()) - set(before))  # there are others
        time.sleep(2)
        assert ask() == 504


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [
        (None, 60, 60),  # what the gateway itself waits
        ("", 60, 60),
        ("3", 2, 3),
        ("2.5", 1.5, 2.5),
        ("90", 60, 60),
    ],
)
def test_a_replica_is_told_how_long_anybody_waits(
    tmp_path: Path, asked: str | None, least: float, most: float
) -> None:
    assert least <= float(timeout_sent(tmp_path, asked)) <= most


@pytest.mark.parametrize("asked", ["soon", "-1", "1e3", "0x10"])
def test_a_timeout_that_is_nonsense_is_left_to_the_handler(tmp_path: Path, asked: str) -> None:
    assert timeout_sent(tmp_path, asked) == asked


def timeout_sent(folder: Path, asked: str | None) -> str:
    """The X-Request-Timeout that a replica gets from the gateway."""
    seen: list[bytes] = []
    with (
        torchserve_that(answer_of(b"{}"), seen) as upstream,
        running(folder, variables(upstreams=upstream)) as gateway,
    ):
        headers = {} if asked is None else {"X-Request-Timeout": asked}
        answer = requests.post(
            f"{gateway.url}/predict", data=SMALL, headers=headers, timeout=TIMEOUT
        )
        assert answer.status_code == 200
    [head] = seen
    [value] = re.findall(rb"(?i)x-request-timeout: (.*)\r\n", head)
    return value.decode()


def test_nobody_is_asked_when_the_time_is_over(tmp_path: Path) -> None:
    with in_front_of(tmp_path, answer_of(b"{}")) as (gateway, _):
        answer = requests.post(
            f"{gateway.url}/predict",
            data=SMALL,
            headers={"X-Request-Timeout": "0"},
            timeout=TIMEOUT,
        )
        check_error(answer, 504, "Timeout")
        assert not gateway.line(answer.headers["X-Request-ID"])["upstream"]
