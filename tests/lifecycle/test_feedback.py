"""Feedback through nginx and TorchServe, on answers in every protocol."""

import re
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.gateway.conftest import Served, nginx, serving_with_gateway
from tests.server.colours import LABELS, encoded

__all__ = ["nginx"]

RED, GREEN = encoded("red"), encoded("green")
TEXTS = [b64encode(image).decode() for image in (RED, GREEN)]
V2 = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [2], "data": TEXTS}]}
# Each of a red and a green image, in this order.
SEVERAL: dict[str, tuple[str, dict[str, Any]]] = {
    "form": ("/predict", {"files": {"file1": RED, "file2": GREEN}}),
    "json": ("/predict?top_k=1", {"json": {"images": TEXTS}}),
    "v1": ("/v1/models/mobilenet_v2:predict", {"json": {"instances": TEXTS}}),
    "v2": ("/v2/models/mobilenet_v2/infer", {"json": V2}),
    "v2 binary": (
        "/v2/models/mobilenet_v2/infer",
        {"json": V2 | {"parameters": {"binary_data_output": True}}},
    ),
}


@pytest.fixture(scope="module")
def gateway(
    tmp_path_factory: pytest.TempPathFactory, nginx: None, colours: list[str], store: Path
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("feedback")
    env = {"GATEWAY_FEEDBACK_REQUESTS": "1000"}
    with serving_with_gateway(folder, colours, store, **env) as served:
        yield served


def predict(gateway: Served, path: str, **body: Any) -> str:
    """The id of the answer."""
    answer = requests.post(gateway.url + path, timeout=60, **body)
    assert answer.status_code == 200, answer.text
    assert "X-Best-Classes" not in answer.headers
    return answer.headers["X-Request-ID"]


def judge(gateway: Served, request_id: str, **fields: object) -> requests.Response:
    body = {"request_id": request_id} | fields
    return requests.post(f"{gateway.url}/feedback", json=body, timeout=60)


def counts(gateway: Served) -> dict[tuple[str, ...], int]:
    """The judgements by class and whether they were correct."""
    text = requests.get(f"{gateway.url}/metrics", timeout=60).text
    labels = r'class_id="(\d)",class="(\w+)",correct="(\w+)"'
    found = re.findall(rf'class_total\{{model="mobilenet_v2",version="1.0",{labels}\}} (\d+)', text)
    return {tuple(labels): int(value) for *labels, value in found}


def test_one_image(gateway: Served) -> None:
    before, logged = counts(gateway), len(gateway.server.log("request"))
    ids = [predict(gateway, "/predict", data=RED) for _ in range(2)]
    right = judge(gateway, ids[0], **{"class": "red"})
    assert right.status_code == 200, right.text
    wrong = judge(gateway, ids[1], class_id=LABELS.index("blue"))
    assert right.json() | {"correct": False} | {"actual": wrong.json()["actual"]} == wrong.json()
    assert (right.json()["predicted"]["class"], right.json()["correct"]) == ("red", True)
    after = counts(gateway)
    for label, correct in (("red", "true"), ("blue", "false")):
        key = (str(LABELS.index(label)), label, correct)
        assert after[key] == before.get(key, 0) + 1
    gateway.server.request_lines(ids)
    requests_since = gateway.server.log("request")[logged:]
    assert {line["request_id"] for line in requests_since} == set(ids), "asking for labels is none"


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_images_in_every_protocol(gateway: Served, kind: str) -> None:
    path, body = SEVERAL[kind]
    request_id = predict(gateway, path, **body)
    assert judge(gateway, request_id, **{"class": "green"}).status_code == 400
    for index, label in enumerate(("red", "green")):
        judged = judge(gateway, request_id, image=index, **{"class": label})
        assert judged.status_code == 200, judged.text
        assert judged.json()["correct"] is True


def test_an_image_that_failed_and_requests_that_did(gateway: Served) -> None:
    partial = predict(gateway, "/predict", files={"file1": b"no image", "file2": GREEN})
    assert "not classified" in judge(gateway, partial, image=0, class_id=0).json()["message"]
    assert judge(gateway, partial, image=1, **{"class": "green"}).status_code == 200
    failed = requests.post(f"{gateway.url}/predict", data=b"no image", timeout=60)
    assert failed.status_code == 400
    assert judge(gateway, failed.headers["X-Request-ID"], class_id=0).status_code == 404
