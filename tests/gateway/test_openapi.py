"""The description of the API and the API are one."""

import json
from base64 import b64encode
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from handler import errors
from handler.images import FORMATS
from tests import ROOT
from tests.drawing import announced
from tests.gateway.conftest import Served
from tests.server.colours import LABELS, encoded

FILE = ROOT / "deploy" / "gateway" / "openapi.json"
DOCUMENT = json.loads(FILE.read_text("utf-8"))


def of_this_model() -> dict[str, Any]:
    """The document, as far as a schema can say it, for a model of three classes.

    The headers are read only if nothing nearer to the image says it: they have a test below.
    """
    document = json.loads(FILE.read_text("utf-8"))
    schemas = document["components"]["schemas"]
    schemas["TopK"]["maximum"] = len(LABELS)
    # JSON Schema takes 1.0 for an integer, and the handler does not.
    schemas["JsonTopK"]["anyOf"][0] = {"enum": [*range(1, len(LABELS) + 1)]}
    schemas["JsonTopK"]["anyOf"][1]["pattern"] = f"^[1-{len(LABELS)}]$"
    del schemas["Form"]["properties"]["filename"]  # which goes with one image only
    for path in document["paths"].values():
        for operation in path.values():
            if isinstance(operation, dict) and "parameters" in operation:
                operation["parameters"] = [
                    parameter
                    for parameter in operation["parameters"]
                    if not parameter["$ref"].endswith("Header")
                ]
    return document


# Small ones: schemathesis keeps all its requests, of up to 32 images, from the start.
images = st.sampled_from(
    [encoded(label, format, size=(32, 32)) for label in LABELS for format in FORMATS]
)
schemathesis.openapi.media_type("image/*", images)
schemathesis.openapi.media_type("application/octet-stream", images)
schemathesis.openapi.format("byte", images.map(lambda image: b64encode(image).decode()))

config = schemathesis.Config.from_dict(
    {
        # Headers that nobody asked for are no error.
        "generation": {"allow-extra-parameters": False},
        # PUT, which curl -T sends, is taken for POST and not described a second time.
        "phases": {"coverage": {"unexpected-methods": ["get", "delete", "patch", "trace"]}},
        "checks": {
            "allow_header_conformance": {"enabled": False},
            "negative_data_rejection": {"expected-statuses": ["4xx"]},
        },
    }
)
api = schemathesis.openapi.from_dict(of_this_model(), config=config)


def test_it_is_valid_openapi() -> None:
    schemathesis.openapi.from_dict(DOCUMENT).validate()


def test_it_is_served(gateway: Served) -> None:
    assert requests.get(f"{gateway.url}/openapi.json", timeout=30).json() == DOCUMENT


@api.parametrize()
@settings(
    max_examples=30,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_whatever_it_allows_is_answered_as_it_says(
    case: schemathesis.Case[Any], gateway: Served
) -> None:
    case.call_and_validate(base_url=gateway.url, timeout=60)


PLAIN = encoded("green")
SEVERAL = {"files": {"file1": PLAIN, "file2": b"no image"}}
REQUESTS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "raw": ("POST", "/predict", {"data": PLAIN}, 200),
    "form": ("POST", "/predict", {"files": {"file": PLAIN, "top_k": (None, "2")}}, 200),
    "json": ("POST", "/predict", {"json": {"image": b64encode(PLAIN).decode()}}, 200),
    "one of two": ("POST", "/predict", SEVERAL, 200),
    "version": ("POST", "/predict?version=1.0", {"data": PLAIN}, 200),
    "own path": ("POST", "/predictions/mobilenet_v2", {"data": PLAIN}, 200),
    "own path with version": ("POST", "/predictions/mobilenet_v2/1.0", {"data": PLAIN}, 200),
    "info": ("GET", "/info", {}, 200),
    "health": ("GET", "/health", {}, 200),
    "livez": ("GET", "/livez", {}, 200),
    "no image": ("POST", "/predict", {}, 400),
    "damaged": ("POST", "/predict", {"data": PLAIN[:500]}, 400),
    "none of two": ("POST", "/predict", {"files": {"file1": b"no", "file2": b"none"}}, 400),
    "top_k": ("POST", "/predict?top_k=4", {"data": PLAIN}, 400),
    "broken json": ("POST", "/predict", {"data": "{"}, 400),
    "unknown model": ("POST", "/predict?model=nobody", {"data": PLAIN}, 404),
    "unknown version": ("POST", "/predictions/mobilenet_v2/9", {"data": PLAIN}, 404),
    "unknown info": ("GET", "/info?model=nobody", {}, 404),
    "method": ("DELETE", "/predict", {}, 405),
    "method of info": ("POST", "/info", {}, 405),
    "bytes": ("POST", "/predict", {"data": bytes(11 * 2**20)}, 413),
    "body": ("POST", "/predict", {"data": bytes(40 * 2**20)}, 413),
    "pixels": ("POST", "/predict", {"data": announced("PNG", 10_000, 10_000)}, 413),
    "format": ("POST", "/predict", {"data": b"%PDF-1.7\n"}, 415),
}  # fmt: skip
PATHS = {
    "/predictions/mobilenet_v2": "/predictions/{model}",
    "/predictions/mobilenet_v2/1.0": "/predictions/{model}/{version}",
    "/predictions/mobilenet_v2/9": "/predictions/{model}/{version}",
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_each_kind_of_answer_is_as_described(kind: str, gateway: Served) -> None:
    method, path, body, status = REQUESTS[kind]
    answer = requests.request(method, f"{gateway.url}{path}", timeout=60, **body)
    assert answer.status_code == status, answer.text
    operations = api[PATHS.get(path, path.partition("?")[0])]
    operations["POST" if path.startswith("/predict") else "GET"].validate_response(answer)
    assert answer.json().get("code", status) == status


def test_the_headers_are_read_if_nothing_nearer_says_it(gateway: Served) -> None:
    def classes(query: str = "", **options: Any) -> int:
        answer = requests.post(f"{gateway.url}/predict{query}", timeout=60, **options).json()
        return len(answer["predictions"])

    header = {"X-Top-K": "1"}
    assert classes(data=PLAIN) == 3
    assert classes(data=PLAIN, headers=header) == 1
    assert classes("?top_k=2", data=PLAIN, headers=header) == 2
    form = {"file": PLAIN, "top_k": (None, "2")}
    assert classes(files=form, headers=header) == 2
    assert classes("?top_k=1", files=form) == 2
    header = {"X-Model-Version": "9"}
    url = f"{gateway.url}/predict"
    assert requests.post(url, data=PLAIN, headers=header, timeout=60).status_code == 404
    answer = requests.post(f"{url}?version=1.0", data=PLAIN, headers=header, timeout=60)
    assert answer.status_code == 200
    for seconds, status in (("30", 200), ("", 200), ("0", 504), ("soon", 400)):
        header = {"X-Request-Timeout": seconds}
        answer = requests.post(url, data=PLAIN, headers=header, timeout=60)
        assert answer.status_code == status


@pytest.mark.parametrize(
    "path", ["/predict", "/predictions/{model}", "/predictions/{model}/{version}"]
)
def test_every_error_of_the_handler_is_described(path: str) -> None:
    described = DOCUMENT["paths"][path]["post"]["responses"]
    kinds = [value for value in vars(errors).values() if isinstance(value, type)]
    statuses = {str(kind.status) for kind in kinds if issubclass(kind, errors.RequestError)}
    assert statuses <= set(described)
