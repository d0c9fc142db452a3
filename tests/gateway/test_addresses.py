"""Replicas behind a name that leads elsewhere after a while, as in Compose and Kubernetes."""

import http.client
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
import requests

from service.gateway import process as gateway
from service.gateway.process import Gateway
from service.gateway.settings import GatewaySettings
from service.logs import Log
from tests.gateway.upstreams import http_server
from tests.processes import free_port, wait_for

DEADLINE_SECONDS = 20


@pytest.fixture
def port() -> Iterator[int]:
    """One port on two addresses, with a replica on each that says where it was reached."""

    def address(request: BaseHTTPRequestHandler) -> bytes:
        return str(request.connection.getsockname()[0]).encode()

    with http_server(address) as port, http_server(address, ("127.0.0.2", port)):
        yield port


def answering(port: int) -> str:
    return requests.post(f"http://127.0.0.1:{port}/predict", data=b"body", timeout=10).text


def test_the_gateway_follows_a_name(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "127.0.0.1"
    by_system = socket.getaddrinfo

    def resolve(host: str, *rest: Any) -> Any:
        if host == "replica" and not address:
            raise OSError("no such name")
        return by_system(address if host == "replica" else host, *rest)

    monkeypatch.setattr("service.gateway.settings.socket.getaddrinfo", resolve)
    monkeypatch.setattr(gateway, "RESOLVE_SECONDS", 0)
    listening = free_port()
    served = Gateway(
        GatewaySettings(port=listening, upstreams=f"replica:{port}", management=f"replica:{port}"),
        Log("json"),
    )
    kept = http.client.HTTPConnection("127.0.0.1", listening, timeout=10)

    def answering_kept() -> bytes:
        """A connection that the gateway has closed is not opened again: the request fails."""
        kept.request("POST", "/predict", b"body")
        return kept.getresponse().read()

    try:
        served.start()
        assert answering(listening) == "127.0.0.1"
        assert answering_kept() == b"127.0.0.1"
        address = ""
        served.check()
        assert answering(listening) == "127.0.0.1", "a name that is not found changes nothing"
        address = "127.0.0.2"

        def follows() -> bool:
            served.check()
            return answering(listening) == "127.0.0.2"

        opened = kept.sock
        wait_for(follows, DEADLINE_SECONDS)
        assert answering_kept() == b"127.0.0.2"
        assert kept.sock is opened
    finally:
        kept.close()
        served.stop()
