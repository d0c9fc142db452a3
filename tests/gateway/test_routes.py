"""Every route and what it answers, in front of the real TorchServe."""

import base64
import json
import re
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from service.banner import banner
from service.torchserve.config import ServerConfig
from tests.gateway.conftest import Served
from tests.gateway.running import running, settings
from tests.server.colours import encoded

RED = encoded("red")
TIMEOUT = 30
NAMES = {
    400: "BadRequest",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    413: "RequestTooLarge",
    414: "UriTooLong",
    431: "HeadersTooLarge",
    503: "Unavailable",
    504: "Timeout",
}


def check_error(answer: requests.Response, status: int, type_name: str = "") -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    error = answer.json()
    assert set(error) == {"status", "code", "type", "message"}
    assert (error["status"], error["code"]) == ("error", status)
    assert error["type"] == (type_name or NAMES[status])
    assert error["message"]
    assert not re.search(r"/tmp|nginx|<|Exception", error["message"])


def best(answer: requests.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["predictions"][0]["class"]


PREDICTIONS: dict[str, dict[str, Any]] = {
    "raw": {"data": RED},
    "multipart": {"files": {"file": RED}},
    "JSON": {"json": {"image": base64.b64encode(RED).decode()}},
    "typed": {"data": RED, "headers": {"Content-Type": "image/jpeg"}},
    "as curl --data-binary": {
        "data": RED,
        "headers": {"Content-Type": "application/x-www-form-urlencoded"},
    },
    "form in capitals": {
        "data": RED,
        "headers": {"Content-Type": "APPLICATION/X-WWW-FORM-URLENCODED; charset=utf-8"},
    },
    "in pieces": {"data": iter([RED[:100], RED[100:]])},
    "describe": {"data": RED, "headers": {"describe": "True"}},
    "explain": {"data": RED, "headers": {"Explain": "True"}},
}


@pytest.mark.parametrize("form", PREDICTIONS)
def test_predict(gateway: Served, form: str) -> None:
    answer = requests.post(f"{gateway.url}/predict", **PREDICTIONS[form], timeout=TIMEOUT)
    assert best(answer) == "red"
    assert answer.headers["X-Model-Version"] == answer.json()["metadata"]["version"] == "1.0"
    assert answer.headers["X-Request-ID"] == answer.json()["metadata"]["request_id"]


@pytest.mark.parametrize(
    "path",
    [
        "/predict?model=mobilenet_v2",
        "/predict?version=1.0&model=mobilenet_v2",
        "/predictions/mobilenet_v2",
        "/predictions/mobilenet_v2/1.0",
        "/mobilenet_v2/predict",
        "/mobilenet_v2/1.0/predict",
        "/v1/models/mobilenet_v2:predict",
        "/v2/models/mobilenet_v2/infer",
    ],
)
def test_every_path_of_predictions(gateway: Served, path: str) -> None:
    joint = "&" if "?" in path else "?"
    url = f"{gateway.url}{path}{joint}top_k=2"
    answer = requests.post(url, data=RED, timeout=TIMEOUT)
    assert best(answer) == "red"
    assert len(answer.json()["predictions"]) == 2
    assert best(requests.put(url, data=RED, timeout=TIMEOUT)) == "red"  # curl -T


def test_top_k_of_the_query_goes_over_the_header(gateway: Served) -> None:
    def count(query: str, **request: Any) -> int:
        url = f"{gateway.url}/predict{query}"
        return len(requests.post(url, **request, timeout=TIMEOUT).json()["predictions"])

    assert count("", data=RED, headers={"X-Top-K": "1"}) == 1
    assert count("?top_k=2", data=RED, headers={"X-Top-K": "1"}) == 2
    assert count("?top_k=2", files={"file": RED}, data={"top_k": "1"}) == 1


@pytest.mark.parametrize("top_k", ["0", "-1", "4", "abc", "1%0a", "1%20", "9" * 50, "1.0", "١"])
def test_a_bad_top_k_is_the_handlers_error(gateway: Served, top_k: str) -> None:
    answer = requests.post(f"{gateway.url}/predict?top_k={top_k}", data=RED, timeout=TIMEOUT)
    check_error(answer, 400, "InvalidTopK")


HANDLER_ERRORS: dict[str, tuple[dict[str, Any], int, str]] = {
    "no image": ({"data": b""}, 400, "NoImage"),
    "garbage": ({"data": b"not an image"}, 400, "UnreadableImage"),
    "a form": ({"data": {"image": "abc"}}, 400, "UnreadableImage"),
    "unknown field": ({"json": {"picture": ""}}, 400, "MalformedRequest"),
    "PDF": ({"data": b"%PDF-1.7"}, 415, "UnsupportedFormat"),
    "11 MB": ({"data": bytes(10 * 2**20 + 1)}, 413, "ImageTooLarge"),
}


@pytest.mark.parametrize("kind", HANDLER_ERRORS)
def test_errors_of_the_handler_pass_unchanged(gateway: Served, kind: str) -> None:
    request, status, type_name = HANDLER_ERRORS[kind]
    answer = requests.post(f"{gateway.url}/predict", **request, timeout=TIMEOUT)
    check_error(answer, status, type_name)
    direct = requests.post(
        gateway.server.predictions,
        **(request | ({"data": b"image=abc"} if kind == "a form" else {})),
        timeout=TIMEOUT,
    )
    assert answer.json() == direct.json()


@pytest.mark.parametrize(
    "path",
    [
        "/predict?model=unknown",
        "/predict?version=7",
        "/predict?model=../models",
        "/predict?model=a%2fb",
        "/predict?model=mobilenet_v2%2f1.0",
        "/predict?model=a%00",
        "/predict?version=../../models",
        "/predict?version=1.0%2f..",
        "/predict/",
        "/predictions/",
        "/predictions/unknown",
        "/predictions/mobilenet_v2/7",
        "/predictions/mobilenet_v2/1.0/extra",
        "/predictions/..%2fmodels",
        "/predictions/mobilenet_v2/..;/models",
        "/predictions/mobilenet_v2%0d%0aX:%20y",
        "/predictions/mobilenet_v2%0a",
        "/predictions/mobilenet_v2/1.0%0a",
        "/v1/models/mobilenet_v2:predict%0a",
        "/predict%0a",
        "/v1/models/mobilenet_v2:explain",
        "/v2/models/mobilenet_v2/explain",
        "/explanations/mobilenet_v2",
        "/models",
        "/models/mobilenet_v2",
        "/invocations",
        "/ping",
        "/api-description",
        "/workflows",
        "/_management/0/mobilenet_v2",
        "/_describe/0/mobilenet_v2",
        "/_first/replica_0/predictions/mobilenet_v2",
        "/_second/replica_0/predictions/mobilenet_v2",
        "/info/mobilenet_v2",
        "/_error",
        "/../scripts/gateway.py",
        "/..%2fgateway.lua",
        "/nginx.conf.template",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nothing_else_is_reachable(gateway: Served, path: str, method: str) -> None:
    request = requests.Request(method, gateway.url, data=RED).prepare()
    request.url = gateway.url + path  # as it is: requests would tidy it up
    with requests.Session() as session:
        answer = session.send(request, timeout=TIMEOUT)
    if method == "GET" and answer.status_code == 405:
        assert answer.headers["Allow"] == "POST, PUT"
    elif method == "POST" and answer.status_code == 405:
        assert answer.headers["Allow"] == "GET, HEAD"
    else:
        check_error(answer, 400 if path.startswith("/..") else 404)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/predict", "POST, PUT"),
        ("/predictions/mobilenet_v2", "POST, PUT"),
        ("/health", "GET, HEAD"),
        ("/livez", "GET, HEAD"),
        ("/info", "GET, HEAD"),
        ("/metrics", "GET, HEAD"),
        ("/openapi.json", "GET, HEAD"),
        ("/", "GET, HEAD"),
    ],
)
def test_wrong_methods(gateway: Served, path: str, allowed: str) -> None:
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        if method in allowed:
            continue
        answer = requests.request(method, gateway.url + path, timeout=TIMEOUT)
        assert answer.headers["Allow"] == allowed
        assert answer.status_code == 405
        if method != "HEAD":
            check_error(answer, 405)


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
    calls: list[float] = []
    under_way = [0, 0]  # now, most

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            pool.submit(reply, connection)

    def reply(connection: socket.socket) -> None:
        with connection:
            calls.append(time.monotonic())
            under_way[0] += 1
            under_way[1] = max(under_way)
            connection.recv(4096)
            time.sleep(0.2)
            under_way[0] -= 1
            body = json.dumps([{"workers": [{"status": "READY"}]}]).encode()
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)

    with socket.socket() as listener, ThreadPoolExecutor(64) as pool:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        pool.submit(serve, listener)
        env = {
            "GATEWAY_MANAGEMENT": f"127.0.0.1:{listener.getsockname()[1]}",
            "GATEWAY_UPSTREAMS": f"127.0.0.1:{gateway.server.ports['port']}",
        }
        with running(tmp_path, env) as other:
            started = time.monotonic()

            def poll(_: int) -> int:
                return requests.get(f"{other.url}/health", timeout=TIMEOUT).status_code

            statuses = set()
            while time.monotonic() - started < 3:
                statuses |= set(pool.map(poll, range(32)))
            seconds = time.monotonic() - started
        listener.shutdown(socket.SHUT_RDWR)
    assert statuses == {200}
    assert 2 <= len(calls) <= seconds + 1
    assert under_way[1] == 1


def test_health_without_torchserve(tmp_path: Path) -> None:
    env = {"GATEWAY_UPSTREAMS": "127.0.0.1:9", "GATEWAY_MANAGEMENT": "127.0.0.1:9"}
    with running(tmp_path, env | {"GATEWAY_MODELS": "resnet50,mobilenet_v2"}) as gateway:
        answer = requests.get(f"{gateway.url}/health", timeout=TIMEOUT)
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "1"
        assert answer.json() == {
            "status": "unhealthy",
            "model": "resnet50",
            "replicas": {"ready": 0, "total": 1},
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


def test_info(gateway: Served) -> None:
    answer = requests.get(f"{gateway.url}/info", timeout=TIMEOUT)
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json() == gateway.server.info()
    assert answer.json()["classes"] == 3
    named = requests.get(f"{gateway.url}/info?model=mobilenet_v2", timeout=TIMEOUT)
    assert named.json() == answer.json()
    check_error(requests.get(f"{gateway.url}/info?model=unknown", timeout=TIMEOUT), 404)
    check_error(requests.get(f"{gateway.url}/info?model=..", timeout=TIMEOUT), 404)


def test_metrics_are_for_allowed_addresses(gateway: Served, tmp_path: Path) -> None:
    page = requests.get(f"{gateway.url}/metrics", timeout=TIMEOUT)
    assert page.headers["Content-Type"].startswith("text/plain")
    assert re.search(r'^gateway_connections\{state="writing"\} [1-9]', page.text, re.MULTILINE)
    env = settings([gateway.server], metrics_allow="10.0.0.0/8")
    with running(tmp_path, env) as other:
        check_error(requests.get(f"{other.url}/metrics", timeout=TIMEOUT), 403)


def test_headers_of_every_answer(gateway: Served) -> None:
    for path in ("/health", "/info", "/nothing", "/predict"):
        answer = requests.get(gateway.url + path, timeout=TIMEOUT)
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'self';")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Request-ID"]
        assert "Strict-Transport-Security" not in answer.headers


def test_a_body_above_the_limit_is_refused(gateway: Served) -> None:
    body = bytes(16 * 2**20 + 1)
    url = f"{gateway.url}/predict"
    check_error(requests.post(url, data=body, timeout=TIMEOUT), 413)
    pieces = (body[start : start + 2**20] for start in range(0, len(body), 2**20))
    check_error(requests.post(url, data=pieces, timeout=TIMEOUT), 413)


def test_the_largest_body_is_taken(gateway: Served) -> None:
    answer = requests.post(f"{gateway.url}/predict", data=bytes(16 * 2**20), timeout=TIMEOUT)
    check_error(answer, 413, "ImageTooLarge")  # by the handler


def test_an_empty_413_of_torchserve_gets_our_form(gateway: Served, tmp_path: Path) -> None:
    env = settings([gateway.server], max_body_bytes=str(64 * 2**20))
    with running(tmp_path, env) as other:
        answer = requests.post(f"{other.url}/predict", data=bytes(17 * 2**20), timeout=TIMEOUT)
        check_error(answer, 413)


def raw(port: int, request: bytes) -> bytes:
    """What comes back until the connection is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


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
    port = int(gateway.url.rpartition(":")[2])
    head, _, body = raw(port, request_bytes).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status)
    assert b"Content-Type: application/json" in head
    assert json.loads(body)["type"] == NAMES[status]


def test_pipelined_requests_are_answered_in_order(gateway: Served) -> None:
    port = int(gateway.url.rpartition(":")[2])
    post = b"POST /predict?top_k=%d HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%s\r\n"
    requests_ = post % (1, len(RED), b"") + RED + post % (2, len(RED), b"Connection: close\r\n")
    answers = raw(port, requests_ + RED)
    bodies = re.findall(rb'"predictions":(\[.*?\])', answers)
    assert [len(json.loads(body)) for body in bodies] == [1, 2]


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
        raw(other.port, b'GET /"\x01\xff{ HTTP/1.1\r\nHost: x\r\n\r\n'.replace(b"GET", b"GET"))
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
    handled = [entry["request_id"] for entry in gateway.server.log("request")]
    assert answer.headers["X-Request-ID"] in handled


def test_the_banners_lines_work(gateway: Served) -> None:
    names = ("port", "management-port", "metrics-port")
    ports = (gateway.server.ports[name] for name in names)
    addresses = ServerConfig.load("127.0.0.1", *ports).addresses
    front: Any = SimpleNamespace(url=gateway.url, has_keys=False)
    text = banner([gateway.server.model], addresses, front, 1.0)
    lines = [line for line in text.splitlines() if f"curl {gateway.url}" in line]
    assert len(lines) == 3
    for line in lines:
        command = "curl" + line.partition("curl")[2] + " --silent --show-error --fail"
        done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, check=True)
        assert json.loads(done.stdout)


@pytest.mark.parametrize("version", ["1.0 HTTP/1.1", "1.0 /../../models", "1.0\t2", "../1.0", "-"])
def test_a_version_is_a_name_or_nothing(gateway: Served, version: str) -> None:
    headers = {"X-Model-Version": version}
    answer = requests.post(f"{gateway.url}/predict", data=RED, headers=headers, timeout=TIMEOUT)
    check_error(answer, 404, "NotFound")


# --- What docs/troubleshooting.md says of the gateway and of TorchServe without it


@pytest.mark.parametrize("version", ["1.1\r\nConnection: close", "1.0"])
def test_a_connection_is_closed_as_asked(gateway: Served, version: str) -> None:
    inference = gateway.server.ports["port"]
    for port, path in ((int(gateway.url.rpartition(":")[2]), "predict"), (inference, "ping")):
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
