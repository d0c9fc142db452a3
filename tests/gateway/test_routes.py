"""Every route and what it answers, in front of the real TorchServe."""

import base64
import json
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from service.banner import banner
from service.torchserve.config import ServerConfig
from tests.gateway.clients import RED, TIMEOUT, best, check_error
from tests.gateway.conftest import Served

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
    ],
)
def test_every_path_of_predictions(gateway: Served, path: str) -> None:
    joint = "&" if "?" in path else "?"
    url = f"{gateway.url}{path}{joint}top_k=2"
    answer = requests.post(url, data=RED, timeout=TIMEOUT)
    assert best(answer) == "red"
    assert len(answer.json()["predictions"]) == 2
    assert best(requests.put(url, data=RED, timeout=TIMEOUT)) == "red"  # curl -T


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
        "/predict%0a",
        "/explanations/",
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
        "/nginx.conf.jinja",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nothing_else_is_reachable(gateway: Served, path: str, method: str) -> None:
    request = requests.Request(method, gateway.url, data=RED).prepare()
    request.url = gateway.url + path  # as it is: requests would tidy it up
    with requests.Session() as session:
        answer = session.send(request, timeout=TIMEOUT)
    if answer.status_code == 405:
        assert method not in answer.headers["Allow"]
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


def test_the_banners_lines_work(gateway: Served) -> None:
    names = ("port", "management-port", "metrics-port")
    ports = (gateway.server.ports[name] for name in names)
    addresses = ServerConfig.load("127.0.0.1", *ports).addresses
    front: Any = SimpleNamespace(url=gateway.url, grpc_url="[::1]:8001", has_keys=False)
    text = banner([gateway.server.model], addresses, front, 1.0)
    lines = [line for line in text.splitlines() if f"curl {gateway.url}" in line]
    assert len(lines) == 3
    assert "gRPC      [::1]:8001" in text
    for line in lines:
        command = "curl" + line.partition("curl")[2] + " --silent --show-error --fail"
        done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, check=True)
        assert json.loads(done.stdout)


@pytest.mark.parametrize("version", ["1.0 HTTP/1.1", "1.0 /../../models", "1.0\t2", "../1.0", "-"])
def test_a_version_is_a_name_or_nothing(gateway: Served, version: str) -> None:
    headers = {"X-Model-Version": version}
    answer = requests.post(f"{gateway.url}/predict", data=RED, headers=headers, timeout=TIMEOUT)
    check_error(answer, 404, "NotFound")
