"""Replicas behind a name that leads elsewhere after a while, as in Compose and Kubernetes."""

import http.client
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from service.gateway import process as gateway
from service.gateway.process import Gateway
from service.gateway.settings import GatewaySettings
from service.logs import Log
from tests.processes import free_port, wait_for

DEADLINE_SECONDS = 20


class Replica(BaseHTTPRequestHandler):
    """Says at which address it was reached."""

    def do_POST(self) -> None:
        host, _ = self.connection.getsockname()
        body = str(host).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    """One port on two addresses, with a replica on each."""
    first = ThreadingHTTPServer(("127.0.0.1", 0), Replica)
    second = ThreadingHTTPServer(("127.0.0.2", first.server_port), Replica)
    threads = [threading.Thread(target=server.serve_forever) for server in (first, second)]
    for thread in threads:
        thread.start()
    yield first.server_port
    for server in (first, second):
        server.shutdown()
        server.server_close()
    for thread in threads:
        thread.join()


def answering(port: int) -> str:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    client.request("POST", "/predict", b"body")
    answer = client.getresponse().read().decode()
    client.close()
    return answer


def test_the_gateway_follows_a_name(nginx: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "127.0.0.1"

    def resolve(host: str, port: int, *_: object) -> list[tuple[object, ...]]:
        if host == "127.0.0.1":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]
        if not address:
            raise OSError("no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr("service.gateway.settings.socket.getaddrinfo", resolve)
    monkeypatch.setattr(gateway, "RESOLVE_SECONDS", 0)
    listening = free_port()
    served = Gateway(
        GatewaySettings(port=listening, upstreams=f"replica:{port}", management=f"replica:{port}"),
        Log("json"),
    )
    try:
        served.start()
        assert answering(listening) == "127.0.0.1"
        address = ""
        served.check()
        assert answering(listening) == "127.0.0.1", "a name that is not found changes nothing"
        address = "127.0.0.2"

        def follows() -> bool:
            served.check()
            return answering(listening) == "127.0.0.2"

        wait_for(follows, DEADLINE_SECONDS)
    finally:
        served.stop()
