"""What deploy/container-test counts and forwards: a check that could not fail would say nothing."""

import http.client
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from container_test import building
from container_test.container import Container
from container_test.load import Load
from tests import ROOT

SCRIPT = ROOT / "deploy" / "container-test"
NOWHERE = Container(key="", pid=0)  # requests are sent on connections that are there
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def connection_to(listener: socket.socket) -> http.client.HTTPConnection:
    host, port = listener.getsockname()
    return http.client.HTTPConnection(host, port, timeout=10)


def outcomes_of(listener: socket.socket, *answers: bytes) -> list[str]:
    """What becomes of a request for each answer, and of one more, on one connection."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            for answer in answers:
                data = b""
                while not data.endswith(b"body"):
                    data += connection.recv(4096)
                connection.sendall(answer)
            connection.recv(1)  # the beginning of a request that gets no answer

    thread = threading.Thread(target=serve)
    thread.start()
    load = Load(NOWHERE)
    connection = connection_to(listener)
    outcomes = []
    for _ in range(len(answers) + 1):
        reused = connection.sock is not None
        if not reused:
            connection.connect()
        outcomes.append(load.request(connection, b"body", {}, reused))
    connection.close()
    thread.join()
    return outcomes


def test_an_answer_is_counted_and_a_connection_closed_between_two_requests_apart(
    listener: socket.socket,
) -> None:
    assert outcomes_of(listener, ANSWER) == ["answered", "closed while idle"]


def test_a_first_request_without_an_answer_is_lost(listener: socket.socket) -> None:
    assert outcomes_of(listener) == ["lost"]


def test_half_an_answer_is_lost(listener: socket.socket) -> None:
    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(ANSWER[:-2])

    thread = threading.Thread(target=serve)
    thread.start()
    connection = connection_to(listener)
    connection.connect()
    assert Load(NOWHERE).request(connection, b"body", {}, False) == "lost"
    connection.close()
    thread.join()


def test_another_status_is_no_answer(listener: socket.socket) -> None:
    refused = ANSWER.replace(b"200 OK", b"503 Unavailable")
    assert outcomes_of(listener, refused)[0] == "status 503"


def test_pips_configuration_is_forwarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels, index = tmp_path / "wheels", tmp_path / "index" / "simple"
    bundle = tmp_path / "bundle.crt"
    wheels.mkdir()
    index.mkdir(parents=True)
    bundle.touch()
    listed = (
        f":env:.cert='{bundle}'\nglobal.find-links='{wheels} /nowhere'\n"
        f"global.extra-index-url='file://{index} https://example.org/simple'\n"
    )
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setattr(building, "run", lambda *_, **__: listed)
    conf = tmp_path / "pip.conf"
    assert building.pip_mounts(tmp_path) == [
        f"{bundle}:{bundle}:ro",
        f"{wheels}:{wheels}:ro",
        f"{index.parent}:{index.parent}:ro",
        f"{conf}:/etc/pip.conf:ro",
    ]
    assert conf.read_text().splitlines() == [
        "[global]",
        f"cert = {bundle}",
        f"find-links = {wheels} /nowhere",
        f"extra-index-url = file://{index} https://example.org/simple",
    ]


def test_help_needs_nothing() -> None:
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--weights" in done.stdout
