"""The description of the API and the API are one."""

import json
import re
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


FARTHER = ("Header", "/topK", "/set", "/unknown", "/explain", "/explainClass")


def of_this_model() -> dict[str, Any]:
    """The document, as far as a schema can say it, for a model of three classes.

    Headers and options of the query are read only if nothing nearer to the image says it: they have
    tests below.
    """
    document = json.loads(FILE.read_text("utf-8"))
    schemas = document["components"]["schemas"]
    # This gateway has no jobs; tests/lifecycle has.
    document["paths"] = {
        name: path for name, path in document["paths"].items() if not name.startswith("/jobs")
    }
    schemas["TopK"]["maximum"] = len(LABELS)
    # Its archive was not calibrated.
    schemas["SetText"] = schemas["Switch"] = {"enum": ["false"]}
    schemas["JsonSet"] = schemas["JsonSwitch"] = {"enum": [False, None, "false"]}
    # JSON Schema takes 1.0 for an integer, and the handler does not.
    schemas["JsonTopK"]["anyOf"][0] = {"enum": [*range(1, len(LABELS) + 1)]}
    schemas["JsonTopK"]["anyOf"][1]["pattern"] = f"^[1-{len(LABELS)}]$"
    schemas["ClassId"]["maximum"] = len(LABELS) - 1
    schemas["JsonClassId"]["anyOf"][0] = {"enum": [*range(len(LABELS))]}
    schemas["JsonClassId"]["anyOf"][1]["pattern"] = f"^[0-{len(LABELS) - 1}]$"
    # Nor can it say that data has as many elements as a shape, or that no output comes twice.
    whole = {"enum": [*range(1, len(LABELS) + 1), None]}
    schemas["V2Output"]["oneOf"][1]["properties"]["parameters"]["properties"]["classification"] = (
        whole
    )
    schemas["V2EncodedImages"]["properties"]["shape"] = {"const": [1]}
    schemas["V2EncodedImages"]["properties"]["data"]["maxItems"] = 1
    schemas["V2Pixels"]["properties"]["shape"] = {"const": [1, 1, 2, 3]}
    six = {"items": {"enum": [*range(256)]}, "minItems": 6, "maxItems": 6}
    schemas["V2Pixels"]["properties"]["data"] |= six
    schemas["V2Request"]["properties"]["outputs"]["maxItems"] = 1
    schemas["ModelName"] = {"enum": ["mobilenet_v2", "unknown"]}
    schemas["ModelVersion"] = {"enum": ["1.0", "9"]}
    del schemas["Form"]["properties"]["filename"]  # which goes with one image only
    for path in document["paths"].values():
        for operation in path.values():
            if isinstance(operation, dict) and "parameters" in operation:
                operation["parameters"] = [
                    parameter
                    for parameter in operation["parameters"]
                    if not parameter["$ref"].endswith(FARTHER)
                ]
    return document


# Small ones: schemathesis keeps all its requests, of up to 32 images, from the start.
images = st.sampled_from(
    [encoded(label, format, size=(32, 32)) for label in LABELS for format in FORMATS]
)
schemathesis.openapi.media_type("image/*", images)
schemathesis.openapi.media_type("application/octet-stream", images)
schemathesis.openapi.format("binary", images)
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
TEXT, PDF = b64encode(PLAIN).decode(), b64encode(b"%PDF-1.7\n").decode()
V1, V2 = "/v1/models/mobilenet_v2:predict", "/v2/models/mobilenet_v2"


def tensor(
    datatype: str, shape: list[int], data: list[Any], binary: bool = False
) -> dict[str, Any]:
    """The options of a V2 request."""
    known = {"name": "image", "datatype": datatype, "shape": shape, "data": data}
    return {"json": {"inputs": [known], "parameters": {"binary_data_output": binary}}}


SEVERAL = {"files": {"file1": PLAIN, "file2": b"no image"}}
REQUESTS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "raw": ("POST", "/predict", {"data": PLAIN}, 200),
    "form": ("POST", "/predict", {"files": {"file": PLAIN, "top_k": (None, "2")}}, 200),
    "json": ("POST", "/predict", {"json": {"image": b64encode(PLAIN).decode()}}, 200),
    "one of two": ("POST", "/predict", SEVERAL, 200),
    "query": ("POST", "/predict?top_k=2&explain=matrix&explain_class=2", {"data": PLAIN}, 200),
    "query of set": ("POST", "/predict?set=0.7", {"data": PLAIN}, 400),
    "query of unknown": ("POST", "/predict?unknown=true", {"data": PLAIN}, 400),
    "explanation by path": ("POST", "/explanations/mobilenet_v2", {"data": PLAIN}, 200),
    "version": ("POST", "/predict?version=1.0", {"data": PLAIN}, 200),
    "own path": ("POST", "/predictions/mobilenet_v2", {"data": PLAIN}, 200),
    "own path with version": ("POST", "/predictions/mobilenet_v2/1.0", {"data": PLAIN}, 200),
    "explain": ("POST", "/predict?explain=matrix&explain_class=2", {"data": PLAIN}, 200),
    "explain json": ("POST", "/predict", {"json": {"image": TEXT, "explain": True}}, 200),
    "explain not": ("POST", "/predict?explain=why", {"data": PLAIN}, 400),
    "explanations": ("POST", "/explanations/mobilenet_v2", {"data": PLAIN}, 200),
    "explanations of a version": ("POST", "/explanations/mobilenet_v2/1.0", {"data": PLAIN}, 200),
    "v1 explain": ("POST", "/v1/models/mobilenet_v2:explain", {"json": {"instances": [TEXT]}}, 200),
    "info": ("GET", "/info", {}, 200),
    "feedback": ("POST", "/feedback", {"json": {"request_id": "a", "class_id": 0}}, 404),
    "method of feedback": ("GET", "/feedback", {}, 405),
    "health": ("GET", "/health", {}, 200),
    "livez": ("GET", "/livez", {}, 200),
    "v1": ("POST", V1, {"json": {"instances": [{"b64": TEXT}], "parameters": {"top_k": 1}}}, 200),
    "v1 image": ("POST", V1, {"json": {"instances": [TEXT, {"image": {"b64": TEXT}}]}}, 200),
    "v1 models": ("GET", "/v1/models", {}, 200),
    "v1 model": ("GET", "/v1/models/mobilenet_v2", {}, 200),
    "v1 without": ("POST", V1, {"json": {"instances": []}}, 400),
    "v1 one of two": ("POST", V1, {"json": {"instances": [TEXT, "bm8="]}}, 400),
    "v1 unknown": ("GET", "/v1/models/nobody", {}, 404),
    "v1 method": ("DELETE", V1, {}, 405),
    "v2": ("POST", f"{V2}/infer", tensor("BYTES", [1], [TEXT]), 200),
    "v2 version": ("POST", f"{V2}/versions/1.0/infer", tensor("BYTES", [1, 1], [TEXT]), 200),
    "v2 pixels": ("POST", f"{V2}/infer", tensor("UINT8", [1, 1, 2, 3], [0, 0, 255] * 2), 200),
    "v2 binary": ("POST", f"{V2}/infer", tensor("BYTES", [1], [TEXT], binary=True), 200),
    "v2 server": ("GET", "/v2", {}, 200),
    "v2 live": ("GET", "/v2/health/live", {}, 200),
    "v2 ready": ("GET", "/v2/health/ready", {}, 200),
    "v2 model": ("GET", V2, {}, 200),
    "v2 model's version": ("GET", f"{V2}/versions/1.0", {}, 200),
    "v2 model ready": ("GET", f"{V2}/ready", {}, 200),
    "v2 version ready": ("GET", f"{V2}/versions/1.0/ready", {}, 200),
    "v2 shape": ("POST", f"{V2}/infer", tensor("BYTES", [2], [TEXT]), 400),
    "v2 unknown": ("GET", "/v2/models/nobody", {}, 404),
    "v2 unknown version": ("POST", f"{V2}/versions/9/infer", tensor("BYTES", [1], [TEXT]), 404),
    "v2 method": ("GET", f"{V2}/infer", {}, 405),
    "v2 body": ("POST", f"{V2}/infer", {"data": bytes(40 * 2**20)}, 413),
    "v2 format": ("POST", f"{V2}/infer", tensor("BYTES", [1], [PDF]), 415),
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


def described(path: str) -> str:
    """The path as the document has it."""
    asked = path.partition("?")[0]
    patterns = {
        re.sub(r"\\{\w+\\}", "[^/:]+", re.escape(known)): known for known in DOCUMENT["paths"]
    }
    [found] = [known for pattern, known in patterns.items() if re.fullmatch(pattern, asked)]
    return found


@pytest.mark.parametrize("kind", REQUESTS)
def test_each_kind_of_answer_is_as_described(kind: str, gateway: Served) -> None:
    method, path, body, status = REQUESTS[kind]
    answer = requests.request(method, f"{gateway.url}{path}", timeout=60, **body)
    assert answer.status_code == status, answer.text
    known = described(path)
    operation = api[known]["POST" if "post" in DOCUMENT["paths"][known] else "GET"]
    operation.validate_response(answer)
    if answer.headers["Content-Type"] == "application/json":
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
