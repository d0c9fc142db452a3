"""HTTP itself: broken, pipelined, closed; the headers of answers, and the log."""

import json
import re
import socket
from pathlib import Path

import pytest
import requests

from tests.gateway.clients import NAMES, RED, TIMEOUT, raw
from tests.gateway.conftest import Served
from tests.gateway.running import running, settings


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 5000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 5000 + b"\r\n", 431),
        (
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        (b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
    ],
)
def test_broken_http(gateway: Served, request_bytes: bytes, status: int) -> None:
    head, _, body = raw(gateway.port, request_bytes).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status)
    assert b"Content-Type: application/json" in head
    assert json.loads(body)["type"] == NAMES[status]


def test_pipelined_requests_are_answered_in_order(gateway: Served) -> None:
    post = b"POST /predict?top_k=%d HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%s\r\n"
    requests_ = post % (1, len(RED), b"") + RED + post % (2, len(RED), b"Connection: close\r\n")
    answers = raw(gateway.port, requests_ + RED)
    bodies = re.findall(rb'"predictions":(\[.*?\])', answers)
    assert [len(json.loads(body)) for body in bodies] == [1, 2]


@pytest.mark.parametrize("version", ["1.1\r\nConnection: close", "1.0"])
def test_a_connection_is_closed_as_asked(gateway: Served, version: str) -> None:
    inference = gateway.server.ports["port"]
    for port, path in ((gateway.port, "predict"), (inference, "ping")):
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as client:
            head = f"POST /{path} HTTP/{version}\r\nHost: x\r\nContent-Length: {len(RED)}\r\n\r\n"
            client.sendall(head.encode() + RED)
            answer = client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")
            client.settimeout(1)
            if port == inference:
                with pytest.raises(TimeoutError):
                    client.recv(65536)
            else:
                while client.recv(65536):
                    pass


def test_headers_of_every_answer(gateway: Served) -> None:
    for path in ("/health", "/info", "/nothing", "/predict"):
        answer = requests.get(gateway.url + path, timeout=TIMEOUT)
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'self';")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Request-ID"]
        assert "Strict-Transport-Security" not in answer.headers


def test_the_log(gateway: Served, tmp_path: Path) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with running(tmp_path, settings([gateway.server])) as other:
        answer = requests.post(
            f"{other.url}/predict?top_k=1&secret=s3cret",
            data=RED,
            headers={"traceparent": trace, "X-Request-ID": 'mine" \\'},
            timeout=TIMEOUT,
        )
        line = other.line(answer.headers["X-Request-ID"])
        page = requests.get(f"{other.url}/nothing", timeout=TIMEOUT)
        assert other.line(page.headers["X-Request-ID"])["path"] == "/nothing"
        raw(other.port, b'GET /"\x01\xff{ HTTP/1.1\r\nHost: x\r\n\r\n')
        assert other.stop() == 0
        lines = other.lines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", line["time"])
    upstream = f"127.0.0.1:{gateway.server.ports['port']}"
    expected = {
        "level": "INFO",
        "event": "gateway",
        "traceparent": trace,
        "client": "",
        "address": "127.0.0.1",
        "method": "POST",
        "path": "/predict",
        "status": 200,
        "upstream": upstream,
        "upstream_status": "200",
        "version": "1.0",
    }
    assert expected.items() <= line.items()
    assert 0 < float(line["upstream_seconds"]) <= line["seconds"] + 0.01
    assert "s3cret" not in other.stdout.read_text() + other.stderr.read_text()
    assert len(lines) == 3, "one line for each request, and none lost by the stop"
    assert gateway.server.request_line(answer.headers["X-Request-ID"])
