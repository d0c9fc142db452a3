"""Whether a replica answers, as the gateway asks it."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.gateway import watch as gateway_watch
from service.gateway.watch import FAILURES, SILENT, Watch, ask_prediction, send
from service.logs import Log
from tests.processes import wait_for
from tests.unit.conftest import Web

PING, PREDICTION = "/ping", "/predictions/birds"


def address(web: Web) -> str:
    return web.url.removeprefix("http://")


@pytest.mark.parametrize(
    ("status", "alive"), [(200, True), (404, True), (503, True), (500, False), (507, False)]
)
def test_a_failed_prediction_is_named(web: Web, status: int, alive: bool) -> None:
    """Who refuses is alive: a full queue is a 503."""
    web.answers[PREDICTION] = web.text("{}", status)
    failure = "" if alive else f"predictions of birds fail with status {status}"
    assert ask_prediction(address(web), "birds", 5) == failure


def test_no_answer(silent_port: int, closed_port: int) -> None:
    found = ask_prediction(f"127.0.0.1:{silent_port}", "birds", 0.2)
    assert found == "no prediction of birds within 0.2 s"
    assert ask_prediction(f"127.0.0.1:{closed_port}", "birds", 5) == SILENT


class Nginx:
    """Takes what it is told on a socket."""

    def __init__(self, folder: Path, answer: bytes = b"HTTP/1.1 204 No Content\r\n\r\n") -> None:
        self.socket = folder / "sock"
        self.told: list[dict[str, dict[str, object]]] = []
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.socket))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                content = json.loads(connection.recv(65536).partition(b"\r\n\r\n")[2])
                self.told.append(content["left_out"])
                connection.sendall(self._answer)


@pytest.fixture
def nginx(tmp_path: Path) -> Nginx:
    return Nginx(tmp_path)


@pytest.fixture
def replicas(nginx: Nginx, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Addresses that are watched, often; nginx is told of them."""
    monkeypatch.setattr(gateway_watch, "ASK_SECONDS", 0.05)
    monkeypatch.setattr(gateway_watch, "PREDICTION_SECONDS", 0.1)
    addresses: list[str] = []
    watch = Watch(lambda: {"upstreams": addresses}, ["birds"], Log("json"))
    watch.start(nginx.socket)
    yield addresses
    watch.stop()


def test_a_replica_is_left_out_and_taken_back(
    web: Web, nginx: Nginx, replicas: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    web.answers |= {PING: web.text("{}"), PREDICTION: web.text("{}")}
    replicas.append(address(web))
    wait_for(lambda: web.asked.count(PREDICTION) >= 3)
    assert nginx.told[-1] == {}
    web.answers[PREDICTION] = web.text("{}", 500)
    why = "predictions of birds fail with status 500"
    wait_for(lambda: nginx.told[-1] == {address(web): {"why": why, "is_silent": False}})
    web.answers[PREDICTION] = web.text("{}")
    wait_for(lambda: nginx.told[-1] == {})
    events = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["event"] for line in events] == ["replica_left_out", "replica_taken_back"]
    assert events[0]["message"] == why


def test_one_failure_is_none(web: Web, nginx: Nginx, replicas: list[str]) -> None:
    failed = [0]

    def now_and_then(request: object) -> None:
        failed[0] += 1
        web.text("{}", 500 if failed[0] % FAILURES else 200)(request)  # type: ignore[arg-type]

    web.answers |= {PING: web.text("{}"), PREDICTION: now_and_then}
    replicas.append(address(web))
    wait_for(lambda: failed[0] > 20)
    assert {json.dumps(told) for told in nginx.told} == {"{}"}


def test_a_replica_that_is_gone_is_no_longer_told_of(
    closed_port: int, nginx: Nginx, replicas: list[str]
) -> None:
    replicas.append(f"127.0.0.1:{closed_port}")
    wait_for(lambda: nginx.told[-1:] == [{replicas[0]: {"why": SILENT, "is_silent": True}}])
    replicas.clear()
    wait_for(lambda: nginx.told[-1] == {})


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: folder / "none",
        lambda folder: Nginx(folder, b"HTTP/1.1 400 Bad Request\r\n\r\n").socket,
    ],
)
def test_what_nginx_does_not_take_is_told_again(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    assert not send(make(tmp_path), "state", {"left_out": {}})
