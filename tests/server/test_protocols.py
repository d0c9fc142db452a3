"""V1 and V2 straight at TorchServe, and its own gRPC, against the real server."""

import json
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from service.torchserve.config import Address
from tests import skip
from tests.drawing import encode, noise, quarters
from tests.server.colours import LABELS, picture
from tests.server.serving import Server
from tests.server.test_requests import TIMEOUT, b64, best, post

IMAGES = [picture(label) for label in LABELS]
IMAGES += [noise((320, 240)), noise((201, 333), seed=1), quarters((640, 480))]
FILES = [encode(image, "JPEG" if index % 2 else "PNG") for index, image in enumerate(IMAGES)]
NEAR = 1e-6

Classes = list[tuple[str, int]]
Confidences = list[float]


@pytest.fixture(scope="module")
def raw(server: Server) -> list[tuple[Classes, Confidences]]:
    """Classes and probabilities of each file as the whole body."""
    return [read(post(server, data=file).json()["predictions"]) for file in FILES]


def read(predictions: list[dict[str, Any]]) -> tuple[Classes, Confidences]:
    classes = [(one["class"], one["class_id"]) for one in predictions]
    return classes, [one["confidence"] for one in predictions]


def compare(
    found: list[tuple[Classes, Confidences]], raw: list[tuple[Classes, Confidences]]
) -> None:
    assert [classes for classes, _ in found] == [classes for classes, _ in raw]
    for (_, seen), (_, expected) in zip(found, raw, strict=True):
        assert seen == pytest.approx(expected, abs=NEAR)


def rows(label: list[str], class_id: Any, confidence: Any) -> list[tuple[Classes, Confidences]]:
    """Three tensors [n, 3] in a row each."""
    classes = list(zip(label, map(int, class_id), strict=True))
    confidences = list(map(float, confidence))
    return [(classes[at : at + 3], confidences[at : at + 3]) for at in range(0, len(classes), 3)]


ROUTES_V1 = ["/v1/models/mobilenet_v2:predict", "/predictions/mobilenet_v2"]
ROUTES_V2 = ["/v2/models/mobilenet_v2/infer", "/predictions/mobilenet_v2/1.0"]


@pytest.mark.parametrize("route", ROUTES_V1)
def test_v1(server: Server, raw: Any, route: str) -> None:
    instances = [{"image": {"b64": b64(file)}} for file in FILES]
    response = requests.post(server.url + route, json={"instances": instances}, timeout=TIMEOUT)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    assert list(response.json()) == ["predictions"]
    compare([read(one) for one in response.json()["predictions"]], raw)


def v2_document(**tensor: Any) -> dict[str, Any]:
    return {"id": "7", "inputs": [{"name": "image", **tensor}]}


def send_binary(
    server: Server, route: str, document: dict[str, Any], tensor: bytes, content_type: str | None
) -> requests.Response:
    text = json.dumps(document).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    if content_type:
        headers["Content-Type"] = content_type
    return requests.post(server.url + route, data=text + tensor, headers=headers, timeout=TIMEOUT)


def elements(files: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(file)) + file for file in files)


@pytest.mark.parametrize("route", ROUTES_V2)
def test_v2_in_json(server: Server, raw: Any, route: str) -> None:
    document = v2_document(datatype="BYTES", shape=[len(FILES)], data=list(map(b64, FILES)))
    response = requests.post(server.url + route, json=document, timeout=TIMEOUT)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    answer = response.json()
    assert (answer["model_name"], answer["model_version"]) == ("mobilenet_v2", "1.0")
    assert answer["id"] == "7"
    assert [one["shape"] for one in answer["outputs"]] == [[len(FILES), 3]] * 4
    compare(rows(*[one["data"] for one in answer["outputs"][:3]]), raw)


@pytest.mark.parametrize("route", ROUTES_V2)
@pytest.mark.parametrize("content_type", [None, "application/octet-stream", "application/json"])
def test_v2_in_binary(server: Server, raw: Any, route: str, content_type: str | None) -> None:
    """Of the wrong type TorchServe finds no JSON in it, and hands it over as it is."""
    tensor = elements(FILES)
    size = {"binary_data_size": len(tensor)}
    document = v2_document(datatype="BYTES", shape=[len(FILES), 1], parameters=size)
    document["parameters"] = {"binary_data_output": True}
    response = send_binary(server, route, document, tensor, content_type)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/octet-stream"
    length = int(response.headers["Inference-Header-Content-Length"])
    sizes = [
        one["parameters"]["binary_data_size"]
        for one in json.loads(response.content[:length])["outputs"]
    ]
    count = len(FILES) * 3
    assert sizes[1:] == [8 * count, 4 * count, 4 * count]  # three classes and their probabilities
    texts, rest = response.content[length:][: sizes[0]], response.content[length:][sizes[0] :]
    labels = []
    while texts:
        (size_of_one,) = struct.unpack_from("<I", texts)
        labels.append(texts[4 : 4 + size_of_one].decode())
        texts = texts[4 + size_of_one :]
    class_ids = np.frombuffer(rest[: sizes[1]], "<i8")
    confidences = np.frombuffer(rest[sizes[1] :][: sizes[2]], "<f4")
    compare(rows(labels, class_ids, confidences), raw)


@pytest.mark.parametrize("form", ["nested", "flat", "binary"])
def test_v2_of_pixels(server: Server, form: str) -> None:
    """A PNG of the same pixels gets the same answer; JSON has some 4 bytes for one of a pixel."""
    images = [image.resize((96, 64)) for image in IMAGES]
    expected = [read(post(server, data=encode(one)).json()["predictions"]) for one in images]
    pixels = np.stack([np.asarray(image) for image in images])
    document = v2_document(datatype="UINT8", shape=[*pixels.shape])
    data = pixels.tobytes()
    if form == "binary":
        document["inputs"][0]["parameters"] = {"binary_data_size": len(data)}
        response = send_binary(server, ROUTES_V2[0], document, data, None)
    else:
        document["inputs"][0]["data"] = pixels.tolist() if form == "nested" else [*data]
        response = requests.post(server.url + ROUTES_V2[0], json=document, timeout=TIMEOUT)
    assert response.status_code == 200, response.text
    compare(rows(*[one["data"] for one in response.json()["outputs"][:3]]), expected)


def test_v2_of_all_probabilities(server: Server, raw: Any) -> None:
    document = v2_document(datatype="BYTES", shape=[len(FILES)], data=list(map(b64, FILES)))
    document["outputs"] = [{"name": "probabilities"}]
    [output] = requests.post(server.url + ROUTES_V2[0], json=document, timeout=TIMEOUT).json()[
        "outputs"
    ]
    assert (output["datatype"], output["shape"]) == ("FP32", [len(FILES), 3])
    probabilities = np.reshape(output["data"], output["shape"])
    for row, (classes, confidences) in zip(probabilities, raw, strict=True):
        assert [row[class_id] for _, class_id in classes] == pytest.approx(confidences, abs=NEAR)


def test_errors_have_the_protocols_form(server: Server) -> None:
    good, bad = b64(FILES[0]), b64(b"not an image")
    v1 = requests.post(server.url + ROUTES_V1[0], json={"instances": [good, bad]}, timeout=TIMEOUT)
    message = "UnreadableImage: image 1: 12 bytes could not be read as an image"
    assert (v1.status_code, v1.json()) == (400, {"error": message})
    document = v2_document(datatype="FP32", shape=[1], data=[0.5])
    v2 = requests.post(server.url + ROUTES_V2[0], json=document, timeout=TIMEOUT)
    assert v2.status_code == 400
    assert v2.json()["error"].startswith("MalformedRequest: input 'image' must be BYTES")


def test_no_body_ends_a_worker(server: Server) -> None:
    """What ends one in TorchServe's own V2, and what it takes for another type of body."""
    before = server.worker_pids()
    header = {"Inference-Header-Content-Length": "5"}
    bodies: list[tuple[bytes, dict[str, str]]] = [
        (b"{}", {"X-Protocol": "v2", "Content-Type": "application/json"}),
        (b'{"inputs": []}', {"Content-Type": "application/json"}),
        (b'{"inputs": [], "id": "\\ud800"}', {"X-Protocol": "v2"}),
        (b'{"inputs": 1', header),
        (b"\xff\xd8\xff\xff\xff\xff", header),
        (b"{}   \xff", header | {"Content-Type": "text/plain"}),
        (b"", header),
        (b'{"instances": ' + b"[" * 900 + b"]" * 900 + b"}", {"Content-Type": "application/json"}),
    ]
    for body, headers in bodies:
        response = post(server, data=body, headers=headers)
        assert list(response.json()) == ["error"], body
        assert response.status_code == 400, body
    assert server.worker_pids() == before


# --- TorchServe's own gRPC: inference.proto of pytorch/serve


def field(number: int, content: bytes) -> bytes:
    """One of protobuf: its number and type, its length as a varint, its bytes."""
    length, left = b"", len(content)
    while left > 127:
        length, left = length + bytes([left & 127 | 128]), left >> 7
    return bytes([number << 3 | 2]) + length + bytes([left]) + content


def ask_grpc(server: Server, folder: Path, **entries: bytes) -> dict[str, Any]:
    """Predictions with a map of bytes; the answer's JSON."""
    pairs = [field(1, name.encode()) + field(2, value) for name, value in entries.items()]
    message = field(1, server.model.encode()) + b"".join(field(3, pair) for pair in pairs)
    (folder / "message").write_bytes(b"\0" + struct.pack(">I", len(message)) + message)
    port = Address("127.0.0.1", server.ports["port"]).grpc_port
    service = "org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
    command = ["curl", "-sS", "--noproxy", "*", "--http2-prior-knowledge", "-o", "answer"]
    command += ["-D", "headers", "-H", "Content-Type: application/grpc", "-H", "TE: trailers"]
    command += ["--data-binary", "@message", f"http://127.0.0.1:{port}/{service}"]
    subprocess.run(command, cwd=folder, check=True, timeout=TIMEOUT)
    assert "grpc-status: 0" in (folder / "headers").read_text()
    answer = (folder / "answer").read_bytes()
    found: dict[str, Any] = json.loads(answer[answer.index(b"{") :])
    return found


def test_torchserves_own_grpc_takes_all_forms(server: Server, raw: Any, tmp_path: Path) -> None:
    """A status of an error is in the body alone: TorchServe's answer is OK."""
    version = subprocess.run(["curl", "-V"], capture_output=True, text=True, check=True)
    if "HTTP2" not in version.stdout:
        skip("this curl has no HTTP/2")
    first, second = FILES[:2]
    whole = ask_grpc(server, tmp_path, data=first)
    compare([read(whole["predictions"])], raw[:1])
    several = ask_grpc(server, tmp_path, file1=first, file2=second, top_k=b"1")
    assert [len(result["predictions"]) for result in several["results"]] == [1, 1]
    own = ask_grpc(server, tmp_path, body=json.dumps({"image": b64(second)}).encode())
    assert best(own) == best(ask_grpc(server, tmp_path, body=second)) == LABELS[1]
    instances = {"instances": [b64(first), b64(second)]}
    v1 = ask_grpc(server, tmp_path, data=json.dumps(instances).encode())
    compare([read(one) for one in v1["predictions"]], raw[:2])
    document = v2_document(datatype="BYTES", shape=[2], data=[b64(first), b64(second)])
    v2 = ask_grpc(server, tmp_path, data=json.dumps(document).encode())
    compare(rows(*[one["data"] for one in v2["outputs"][:3]]), raw[:2])
    bad = ask_grpc(server, tmp_path, data=b"not an image")
    assert (bad["code"], bad["type"]) == (400, "UnreadableImage")
