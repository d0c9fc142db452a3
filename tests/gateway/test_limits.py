"""Rates, concurrency and sizes."""

import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import requests

from tests.gateway.clients import RED, TIMEOUT, best, check_error, client
from tests.gateway.conftest import Served
from tests.gateway.running import in_front_of, running, settings
from tests.processes import wait_for


def test_one_client_is_limited_and_another_is_not(gateway: Served, tmp_path: Path) -> None:
    with running(tmp_path, settings([gateway.server], rate="1", burst="3")) as other:
        url = f"{other.url}/predict"
        greedy, modest = client("127.0.0.1"), client("127.0.0.2")
        answers = [greedy.post(url, data=RED, timeout=TIMEOUT) for _ in range(10)]
        statuses = Counter(answer.status_code for answer in answers)
        assert statuses[200] >= 4
        assert statuses[429] >= 2
        assert statuses.total() == statuses[200] + statuses[429]
        limited = next(answer for answer in answers if answer.status_code == 429)
        check_error(limited, 429)
        assert limited.headers["Retry-After"] == "1"
        assert best(modest.post(url, data=RED, timeout=TIMEOUT)) == "red"
        assert all(
            greedy.get(f"{other.url}/health", timeout=TIMEOUT).status_code == 200 for _ in range(10)
        )
        time.sleep(1.5)
        assert best(greedy.post(url, data=RED, timeout=TIMEOUT)) == "red"


def test_requests_at_once_are_limited(tmp_path: Path) -> None:
    limits = {"max_concurrent": "3", "max_concurrent_per_client": "2"}
    started = in_front_of(tmp_path, None, **limits, response_timeout_seconds="3")
    with started as (gateway, _), ThreadPoolExecutor(8) as pool:

        def ask(address: str) -> requests.Response:
            return client(address).post(f"{gateway.url}/predict", data=RED, timeout=TIMEOUT)

        answers = list(pool.map(ask, ["127.0.0.1"] * 4 + ["127.0.0.2"] * 2))
    of_first = Counter(answer.status_code for answer in answers[:4])
    of_all = Counter(answer.status_code for answer in answers)
    assert of_first[504] <= 2
    assert of_all == {504: 3, 429: 3}
    for answer in answers:
        check_error(answer, answer.status_code)
        if answer.status_code == 504:
            assert 2.5 < answer.elapsed.total_seconds() < 10, "one replica is not asked twice"


def test_a_body_above_the_limit_is_refused_in_pieces_too(gateway: Served) -> None:
    body = bytes(16 * 2**20 + 1)
    url = f"{gateway.url}/predict"
    pieces = (body[start : start + 2**20] for start in range(0, len(body), 2**20))
    check_error(requests.post(url, data=pieces, timeout=TIMEOUT), 413)


@pytest.mark.parametrize(("more", "at_the_gateway"), [(0, "ImageTooLarge"), (1, "RequestTooLarge")])
def test_the_largest_body_and_one_byte_more(
    gateway: Served, more: int, at_the_gateway: str
) -> None:
    body = bytes(16 * 2**20 + more)
    answer = requests.post(f"{gateway.url}/predict", data=body, timeout=TIMEOUT)
    check_error(answer, 413, at_the_gateway)
    answer = requests.post(gateway.server.predictions, data=body, timeout=TIMEOUT)
    if more:
        assert (answer.status_code, answer.content) == (413, b"")
    else:
        check_error(answer, 413, "ImageTooLarge")


def test_an_empty_413_of_torchserve_gets_our_form(gateway: Served, tmp_path: Path) -> None:
    env = settings([gateway.server], max_body_bytes=str(64 * 2**20))
    with running(tmp_path, env) as other:
        answer = requests.post(f"{other.url}/predict", data=bytes(17 * 2**20), timeout=TIMEOUT)
        check_error(answer, 413)


def test_refused_bodies_leave_room_for_others(gateway: Served, tmp_path: Path) -> None:
    """Too large, or broken, as turns out while they come: far more than there is room for."""
    env = settings([gateway.server], max_body_bytes=str(2**20), max_concurrent="4")
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    too_large = [b"%x\r\n%s\r\n" % (2**19, bytes(2**19))] * 3
    with running(tmp_path, env) as other:
        for number in range(60):
            with socket.create_connection(("127.0.0.1", other.port), timeout=TIMEOUT) as sender:
                sender.sendall(head)
                time.sleep(0.01)  # so that the rest comes later
                status = 413 if number % 2 else 400
                with suppress(BrokenPipeError, ConnectionResetError):
                    for piece in too_large if status == 413 else [b"no length\r\n"]:
                        sender.sendall(piece)
                    answer = sender.recv(65536)
                    assert answer.startswith(b"HTTP/1.1 %d" % status)
                    assert b'"status":"error"' in answer
        wait_for(lambda: len(other.lines()) == 60)
        assert best(client("127.0.0.1").post(f"{other.url}/predict", data=RED)) == "red"
        assert "lua" not in other.stderr.read_text()
        assert "[alert]" not in other.stderr.read_text()


@pytest.mark.parametrize(
    ("parts", "before"), [(1000, ""), (1000, "\t"), (2000, ""), (2000, "\t"), (250_000, "")]
)
def test_a_flood_of_form_parts_does_not_reach_torchserves_parser(
    gateway: Served, parts: int, before: str
) -> None:
    """TorchServe alone takes half a minute for the last of these."""
    part = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n'
    body = part * parts + b"--x--\r\n"
    url = f"{gateway.url}/predict"
    request = requests.Request("POST", url, data=body).prepare()
    request.headers["Content-Type"] = f"{before}multipart/form-data; boundary=x"
    with requests.Session() as session:
        session.trust_env = False
        answer = session.send(request, timeout=TIMEOUT)
    check_error(answer, 413, "TooManyImages")
    assert answer.elapsed.total_seconds() < 5
