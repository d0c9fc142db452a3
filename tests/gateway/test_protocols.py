"""The gateway's side of the open protocols: routes, headers, metadata, readiness and errors.

What the handler makes of bodies has tests of its own; stand-ins are behind the gateway here.
"""

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import requests

from tests import ROOT
from tests.gateway.clients import TIMEOUT
from tests.gateway.conftest import Served
from tests.gateway.running import Gateway, in_front_of, running, variables
from tests.gateway.test_keys import KEYS, key_line
from tests.gateway.upstreams import answer_of, http_server, torchserve_that
from tests.processes import wait_for

MODEL = "/v2/models/resnet50"


@dataclass
class Management:
    """A stand-in for TorchServe's: resnet50 in versions 1.0, the default, and 2.0."""

    ready: set[str] = field(default_factory=lambda: {"1.0"})
    classes: dict[str, int] = field(default_factory=lambda: {"1.0": 1000, "2.0": 3})
    asked: list[str] = field(default_factory=list)

    def answer(self, request: BaseHTTPRequestHandler) -> bytes:
        self.asked.append(request.path)
        path, _, query = request.path.partition("?")
        match = re.fullmatch(r"/models/resnet50(?:/(all|1\.0|2\.0))?", path)
        if not match:
            return b'{"code": 404}'
        versions = sorted(self.classes) if match[1] == "all" else [match[1] or "1.0"]
        return json.dumps([self._describe(version, query) for version in versions]).encode()

    def _describe(self, version: str, query: str) -> dict[str, Any]:
        status = "READY" if version in self.ready else "UNLOADING"
        facts: dict[str, Any] = {"modelVersion": version, "workers": [{"status": status}]}
        if query:
            known = version == "2.0"
            facts["customizedMetadata"] = {
                "model": "resnet50",
                "version": version,
                "classes": self.classes[version],
                "certificate": {"images": 8, "engine": "openvino-bf16"} if known else None,
                "confidence": {"temperature": 0.7} if known else None,
            }
        return facts


@contextmanager
def described(
    folder: Path, answer: bytes = answer_of(b"{}"), **settings: str
) -> Iterator[tuple[Gateway, Management]]:
    """A gateway in front of a replica that has resnet50."""
    management = Management()
    with (
        torchserve_that(answer) as upstream,
        http_server(management.answer) as port,
    ):
        known = {"upstreams": upstream, "management": f"127.0.0.1:{port}", "models": "resnet50"}
        with running(folder, variables(**known | settings)) as gateway:
            yield gateway, management


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, Management]]:
    with described(tmp_path_factory.mktemp("served")) as served:
        yield served


def get(gateway: Gateway, path: str, **headers: str) -> requests.Response:
    return requests.get(gateway.url + path, headers=headers, timeout=TIMEOUT)


def error_of(answer: requests.Response, status: int) -> str:
    """The error, which must have the protocols' form, and say nothing of what is behind."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    [(key, text)] = answer.json().items()
    assert key == "error"
    assert re.fullmatch(r"[A-Z][A-Za-z]+: \S.+", text)
    assert not re.search(r"/tmp|nginx|<|Exception", text)
    return str(text)


@pytest.mark.parametrize("path", ["/v2", "/v2/"])
def test_what_the_server_is(served: tuple[Gateway, Management], path: str) -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    name, version = re.findall(r'^(?:name|version) = "(.+)"$', project, re.MULTILINE)
    answer = get(served[0], path)
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json() == {
        "name": name,
        "version": version,
        "extensions": ["binary_tensor_data", "classification"],
    }


@pytest.mark.parametrize(
    ("path", "classes", "properties"),
    [
        (MODEL, 1000, {}),
        (f"{MODEL}/versions/1.0", 1000, {}),
        (
            f"{MODEL}/versions/2.0",
            3,
            {
                "properties": {
                    "certificate.images": "8",
                    "certificate.engine": "openvino-bf16",
                    "confidence.temperature": "0.7",
                }
            },
        ),
    ],
)
def test_what_a_model_takes_and_gives(
    tmp_path: Path, path: str, classes: int, properties: dict[str, dict[str, str]]
) -> None:
    with described(tmp_path) as (gateway, management):
        management.ready.add("2.0")
        answer = get(gateway, path)
        asked = len(management.asked)
        assert get(gateway, path).json() == answer.json()
        assert sum("customized" in path for path in management.asked) == 1
        assert asked <= 5
    assert answer.json() == {
        "name": "resnet50",
        "versions": ["1.0", "2.0"],
        "platform": "pytorch_torchserve",
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [-1, -1]},
            {"name": "class_id", "datatype": "INT64", "shape": [-1, -1]},
            {"name": "confidence", "datatype": "FP32", "shape": [-1, -1]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, classes]},
        ],
        **properties,
    }


def test_a_version_that_loads_is_not_ready_and_not_described(
    served: tuple[Gateway, Management],
) -> None:
    gateway, _ = served
    ready = get(gateway, f"{MODEL}/versions/1.0/ready")
    assert (ready.status_code, ready.json()) == (200, {"name": "resnet50", "ready": True})
    assert get(gateway, f"{MODEL}/ready").json() == {"name": "resnet50", "ready": True}
    loading = get(gateway, f"{MODEL}/versions/2.0/ready")
    assert (loading.status_code, loading.json()) == (400, {"name": "resnet50", "ready": False})
    assert "resnet50/2.0" in error_of(get(gateway, f"{MODEL}/versions/2.0"), 503)
    assert get(gateway, "/v2/health/ready").json() == {"ready": True}
    assert get(gateway, "/v2/health/live").json() == {"live": True}
    assert get(gateway, "/v1/models").json() == {"models": ["resnet50"]}
    assert get(gateway, "/v1/models/resnet50").json() == {"name": "resnet50", "ready": True}


@pytest.mark.parametrize("known", ["no worker", "no management", "no prediction"])
def test_readiness_is_true(tmp_path: Path, known: str) -> None:
    """A status from 400 on is "not ready", with 200 for what is alive all the same."""
    failing = answer_of(b"{}", "500 ", by_handler=False)
    answer = failing if known == "no prediction" else answer_of(b"{}")
    settings = {"management": "127.0.0.1:9"} if known == "no management" else {}
    with described(tmp_path, answer, **settings) as (gateway, management):
        if known == "no worker":
            management.ready.clear()
        wait_for(lambda: get(gateway, "/v2/health/ready").status_code == 400)
        assert get(gateway, "/v2/health/ready").json() == {"ready": False}
        for path in (f"{MODEL}/ready", f"{MODEL}/versions/1.0/ready"):
            answer_ = get(gateway, path)
            assert (answer_.status_code, answer_.json()["ready"]) == (400, False)
        first = get(gateway, "/v1/models/resnet50")
        assert (first.status_code, first.json()) == (503, {"name": "resnet50", "ready": False})
        if known != "no prediction":
            error_of(get(gateway, MODEL), 503)
        assert get(gateway, "/v2/health/live").status_code == 200
        assert get(gateway, "/v2").status_code == 200
        assert get(gateway, "/v1/models").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/unknown",
        "/v1/models/resnet50:predict%0a",
        "/v1/models/",
        "/v1/models/resnet50/extra",
        "/v1/",
        "/v2/models",
        "/v2/models/unknown",
        "/v2/models/unknown/ready",
        "/v2/models/unknown/versions/1.0",
        "/v2/models/resnet50%2f1.0",
        "/v2/models/resnet50%0a",
        "/v2/models/resnet50/versions/3",
        "/v2/models/resnet50/versions/all",
        "/v2/models/resnet50/versions/1.0%3fcustomized=true",
        "/v2/models/resnet50/versions/3/ready",
        "/v2/models/resnet50/versions/",
        "/v2/models/resnet50/versions/1.0/extra",
        "/v2/health",
        "/v2/health/live%0a",
        "/v2/repository/index",
    ],
)
def test_what_does_not_exist(served: tuple[Gateway, Management], path: str) -> None:
    gateway, management = served
    assert error_of(get(gateway, path), 404).startswith("NotFound: ")
    known = r"/models/resnet50(/all|/2\.0|/1\.0)?(\?customized=true)?"
    assert all(re.fullmatch(known, asked) for asked in management.asked)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/v2", "GET, HEAD"),
        ("POST", "/v2/health/ready", "GET, HEAD"),
        ("POST", MODEL, "GET, HEAD"),
        ("DELETE", f"{MODEL}/ready", "GET, HEAD"),
        ("POST", "/v1/models/resnet50", "GET, HEAD"),
        ("GET", f"{MODEL}/infer", "POST, PUT"),
        ("GET", f"{MODEL}/versions/1.0/infer", "POST, PUT"),
        ("GET", "/v1/models/resnet50:predict", "POST, PUT"),
    ],
)
def test_wrong_methods(
    served: tuple[Gateway, Management], method: str, path: str, allowed: str
) -> None:
    answer = requests.request(method, served[0].url + path, timeout=TIMEOUT)
    assert "MethodNotAllowed" in error_of(answer, 405)
    assert answer.headers["Allow"] == allowed


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "path",
    [f"{MODEL}/explain", f"{MODEL}/versions/1.0/explain"],
)
def test_v2_is_told_how_it_is_asked_to_explain(
    served: tuple[Gateway, Management], method: str, path: str
) -> None:
    answer = requests.request(method, served[0].url + path, data=b"{}", timeout=TIMEOUT)
    message = "V2 is asked to explain by the parameter explain of /infer"
    assert error_of(answer, 501) == f"NotImplemented: {message}"


def test_what_needs_a_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(key_line("alice") + key_line("carol", "disabled"))
    with described(tmp_path, keys=str(file)) as (gateway, _):
        for path in ("/v2", "/v2/health/live", "/v2/health/ready", f"{MODEL}/ready"):
            assert get(gateway, path).status_code == 200
        for path in ("/v1/models", "/v1/models/resnet50"):
            assert get(gateway, path).status_code == 200
        for path in (MODEL, f"{MODEL}/versions/1.0"):
            answer = get(gateway, path)
            assert error_of(answer, 401).startswith("Unauthorized: ")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            error_of(get(gateway, path, **{"X-API-Key": KEYS["carol"]}), 403)
            assert get(gateway, path, **{"X-API-Key": KEYS["alice"]}).status_code == 200
        for path in (f"{MODEL}/infer", "/v1/models/resnet50:predict"):
            error_of(requests.post(gateway.url + path, data=b"{}", timeout=TIMEOUT), 401)


def passed_on(folder: Path, path: str, **headers: str) -> tuple[str, dict[str, str]]:
    """The path and the headers that TorchServe gets."""
    seen: list[bytes] = []
    with (
        torchserve_that(answer_of(b"{}"), seen) as upstream,
        running(folder, variables(upstreams=upstream)) as gateway,
    ):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        url = gateway.url + path
        assert requests.post(url, data=b"{}", headers=named, timeout=TIMEOUT).status_code == 200
    [data] = seen
    request, *lines = data.decode().partition("\r\n\r\n")[0].split("\r\n")
    got = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return request.split()[1], got


@pytest.mark.parametrize(
    ("path", "target", "protocol"),
    [
        ("/v1/models/m:predict?top_k=3", "/predictions/m", "v1"),
        ("/v2/models/m/infer?top_k=3", "/predictions/m", "v2"),
        ("//v2/models/m/infer?top_k=3", "/predictions/m", "v2"),
        ("/v2/models/m/versions/1.0/infer?top_k=3", "/predictions/m/1.0", "v2"),
        ("/predictions/m?top_k=3", "/predictions/m", None),
        ("/predict?top_k=3&model=m", "/predictions/m", None),
        ("/m/predict?top_k=3&next=/v2/", "/predictions/m", None),
    ],
)
def test_torchserve_is_told_the_protocol(
    tmp_path: Path, path: str, target: str, protocol: str | None
) -> None:
    forged = {"X_Protocol": "v1" if protocol == "v2" else "v2"}
    length = {"Inference_Header_Content_Length": "17"}
    seen, headers = passed_on(tmp_path, path, **forged, **length)
    assert seen == target
    assert headers.get("x-protocol") == protocol
    assert headers["x-top-k"] == "3"
    assert headers["inference-header-content-length"] == "17"


@pytest.mark.parametrize("length", ["-1", "1 2", "0x10", "1.0", "9" * 10, "١"])
def test_a_length_that_is_no_number_is_a_word_that_is_refused(tmp_path: Path, length: str) -> None:
    headers = {"Inference_Header_Content_Length": length.encode().decode("latin-1")}
    _, seen = passed_on(tmp_path, f"{MODEL}/infer", **headers)
    assert seen["inference-header-content-length"] == "invalid"


def test_binary_answers_come_through(tmp_path: Path) -> None:
    header = b'{"outputs": []}'
    body = header + bytes(range(256))
    answer = answer_of(body).replace(
        b"content-type: application/json",
        b"content-type: application/octet-stream\r\nInference-Header-Content-Length: 15",
    )
    with in_front_of(tmp_path, answer) as (gateway, _):
        got = requests.post(f"{gateway.url}{MODEL}/infer", data=b"{}", timeout=TIMEOUT)
        assert got.headers["Inference-Header-Content-Length"] == "15"
        assert got.headers["Content-Type"] == "application/octet-stream"
        assert got.content == body


@pytest.mark.parametrize("path", [f"{MODEL}/infer", "/v1/models/resnet50:predict"])
def test_every_error_has_the_protocols_form(tmp_path: Path, path: str) -> None:
    """TorchServe's own, the gateway's, and of a body while it arrives."""
    limits = {"max_body_bytes": "1000", "rate": "1", "burst": "3"}
    missing = answer_of(b'{"code": 404, "message": "no such version"}', "404 ", by_handler=False)
    with in_front_of(tmp_path, missing, **limits) as (gateway, _):

        def post(body: Any = b"{}", **headers: str) -> requests.Response:
            return requests.post(gateway.url + path, data=body, headers=headers, timeout=TIMEOUT)

        assert error_of(post(), 404) == "NotFound: no such version"
        assert (
            error_of(post(bytes(1001)), 413) == "RequestTooLarge: the body has more than 1000 bytes"
        )
        pieces = iter([bytes(600), bytes(600)])
        assert error_of(post(pieces), 413).startswith("RequestTooLarge: ")
        limited = [answer for answer in (post() for _ in range(8)) if answer.status_code == 429]
        assert error_of(limited[0], 429).startswith("TooManyRequests: ")
        assert limited[0].headers["Retry-After"] == "1"


@pytest.mark.parametrize("path", [f"{MODEL}/infer", "/v1/models/resnet50:predict"])
def test_nobody_there_and_no_time_left(tmp_path: Path, path: str) -> None:
    with running(tmp_path, variables(upstreams="127.0.0.1:9")) as gateway:
        url = gateway.url + path
        assert "Unavailable" in error_of(requests.post(url, data=b"{}", timeout=TIMEOUT), 503)
        late = requests.post(url, data=b"{}", headers={"X-Request-Timeout": "0"}, timeout=TIMEOUT)
        assert error_of(late, 504).startswith("Timeout: ")


BLOCKS = re.findall(r"(?m)(?:^(?: {4}.*)?\n)+", (ROOT / "docs" / "protocols.md").read_text("utf-8"))
EXAMPLES = [  # that of ./scripts/conformance runs in tests/conformance
    block
    for block in map(textwrap.dedent, BLOCKS)
    if ":8000" in block and "./scripts/conformance" not in block
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_what_the_document_shows_works(gateway: Served, example: str) -> None:
    text, _, shown = example.partition("\nEND\n")
    text = text.replace("127.0.0.1:8000", f"127.0.0.1:{gateway.port}")
    if shown:
        command = ["bash", "-c", text.replace("curl", "curl -sS --noproxy '*'", 1) + "\nEND\n"]
    else:
        command = [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if shown:
        answer, expected = json.loads(done.stdout), json.loads(shown)
        assert shape_of(answer) == shape_of(expected)
    else:
        assert re.fullmatch(r"\[\[b'\w+' b'\w+'\]\]\n", done.stdout)


def shape_of(value: Any) -> Any:
    """An answer without its numbers and class names, which are those of another model."""
    if isinstance(value, dict):
        kept = ("name", "datatype", "shape", "id", "model_name")
        return {key: one if key in kept else shape_of(one) for key, one in value.items()}
    return [shape_of(one) for one in value] if isinstance(value, list) else type(value)


def test_an_error_of_the_handler_passes_unchanged(tmp_path: Path) -> None:
    body = b'{"error": "UnreadableImage: image 2: 3 bytes could not be read as an image"}'
    with in_front_of(tmp_path, answer_of(body, "400 ")) as (gateway, _):
        answer = requests.post(f"{gateway.url}{MODEL}/infer", data=b"{}", timeout=TIMEOUT)
    assert (answer.status_code, answer.content) == (400, body)
