"""What deploy/container-test counts and forwards: a check that could not fail would say nothing."""

import http.client
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from container_test import building
from container_test.container import Container
from container_test.load import Load
from tests import ROOT

SCRIPT = ROOT / "deploy" / "container-test"
NOWHERE = Container(key="", pid=0)  # requests are sent on connections that are there
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood"


@pytest.mark.parametrize(
    ("answers", "outcomes"),
    [
        ([], ["lost"]),
        ([ANSWER], ["answered", "closed while idle"]),
        ([ANSWER[:-2]], ["lost"]),
        ([ANSWER.replace(b"200 OK", b"503 Unavailable")], ["status 503"]),
    ],
    ids=["none", "whole", "half", "another status"],
)
def test_what_becomes_of_requests_on_one_connection(
    answers: list[bytes], outcomes: list[str]
) -> None:
    """Of one for each answer, after which the server closes, and of one more."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            for answer in answers:
                data = b""
                while not data.endswith(b"body"):
                    data += connection.recv(4096)
                connection.sendall(answer)

    load = Load(NOWHERE)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        host, port = listener.getsockname()
        client = http.client.HTTPConnection(host, port, timeout=10)
        for outcome in outcomes:
            reused = client.sock is not None
            if not reused:
                client.connect()
            assert load.request(client, b"body", {}, reused) == outcome
        client.close()
        thread.join()


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
