"""Requests of V1 and V2 through the handler: answers and errors in the protocols' own forms.

The engine has a softmax of the mean colour by 25: for (50, 25, 0) that of 2, 1 and 0.
"""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import handler.image_classifier
from handler.image_classifier import ImageClassifier
from tests.drawing import encode, plain
from tests.unit.handler.worker import Counted, Fake, Reply, ask, b64, broken, start

pytestmark = pytest.mark.usefixtures("isolation")

FIRST, SECOND = (50, 25, 0), (0, 50, 25)
ONE, TWO = (encode(plain(colour, (8, 6))) for colour in (FIRST, SECOND))
BAD, SVG = b"not an image", b"<svg xmlns='http://www.w3.org/2000/svg'/>"
HIGH, MIDDLE, LOW = 0.665241, 0.244728, 0.090031  # e², e and 1 by their sum, 11.107338

JSON, OCTETS = "application/json", "application/octet-stream"


@pytest.fixture
def classifier(model_dir: Path) -> ImageClassifier:
    classifier = start(model_dir)
    classifier.engine = Fake()
    return classifier


def v1(*images: bytes, **parameters: Any) -> dict[str, Any]:
    instances = [{"b64": b64(image)} for image in images]
    return {"body": {"instances": instances, "parameters": parameters}}


def v2(*images: bytes, **more: Any) -> dict[str, Any]:
    data = [b64(image) for image in images]
    tensor = {"name": "image", "shape": [len(data)], "datatype": "BYTES", "data": data}
    return {"body": {"inputs": [tensor], **more}}


def pixels(*colours: Sequence[int], size: tuple[int, int] = (8, 6)) -> dict[str, Any]:
    width, height = size
    data = [value for colour in colours for value in [*colour] * (width * height)]
    shape = [len(colours), height, width, 3]
    tensor = {"name": "image", "shape": shape, "datatype": "UINT8", "data": data}
    return {"body": {"inputs": [tensor]}}


def outputs(*names: str, **parameters: Any) -> list[dict[str, Any]]:
    return [{"name": name, "parameters": parameters} for name in names]


def prediction(class_id: int, confidence: float) -> dict[str, Any]:
    label = ("heron", "crane", "crane")[class_id]
    return {"class": label, "class_id": class_id, "confidence": confidence}


def ok(reply: Reply) -> Any:
    assert (reply.status, reply.content_type) == (200, JSON), reply.body
    assert "Inference-Header-Content-Length" not in reply.headers
    assert reply.headers["X-Model-Version"] == "1.0"
    return reply.body


# --- V1


def test_v1(classifier: ImageClassifier) -> None:
    [reply] = ask(classifier, v1(ONE, TWO, top_k=2))
    assert ok(reply) == {
        "predictions": [
            [prediction(0, HIGH), prediction(1, MIDDLE)],
            [prediction(1, HIGH), prediction(2, MIDDLE)],
        ]
    }


def test_v1_with_one_instance_has_one_list(classifier: ImageClassifier) -> None:
    [reply] = ask(classifier, v1(ONE))
    expected = [prediction(0, HIGH), prediction(1, MIDDLE), prediction(2, LOW)]
    assert ok(reply) == {"predictions": [expected]}


# --- V2 in JSON


def test_v2(classifier: ImageClassifier) -> None:
    [reply] = ask(classifier, v2(ONE, TWO, id="42", parameters={"top_k": 2}))
    probabilities = ok(reply)["outputs"].pop()
    assert (probabilities["name"], probabilities["shape"]) == ("probabilities", [2, 3])
    assert probabilities["data"][0] == pytest.approx(HIGH, abs=1e-6)
    assert reply.body == {
        "model_name": "birds",
        "model_version": "1.0",
        "id": "42",
        "outputs": [
            {
                "name": "label",
                "datatype": "BYTES",
                "shape": [2, 2],
                "data": ["heron", "crane", "crane", "crane"],
            },
            {"name": "class_id", "datatype": "INT64", "shape": [2, 2], "data": [0, 1, 1, 2]},
            {
                "name": "confidence",
                "datatype": "FP32",
                "shape": [2, 2],
                "data": [HIGH, MIDDLE, HIGH, MIDDLE],
            },
        ],
    }


def test_v2_has_an_id_only_if_one_was_sent(classifier: ImageClassifier) -> None:
    [reply] = ask(classifier, v2(ONE))
    assert list(ok(reply)) == ["model_name", "model_version", "outputs"]


def test_v2_outputs_by_name(classifier: ImageClassifier) -> None:
    asked = outputs("probabilities", "class_id")
    [reply] = ask(classifier, v2(ONE, TWO, outputs=asked, parameters={"top_k": 1}))
    probabilities, class_id = ok(reply)["outputs"]
    assert class_id == {"name": "class_id", "datatype": "INT64", "shape": [2, 1], "data": [0, 1]}
    values = probabilities.pop("data")
    assert probabilities == {"name": "probabilities", "datatype": "FP32", "shape": [2, 3]}
    assert values == pytest.approx([HIGH, MIDDLE, LOW, LOW, HIGH, MIDDLE], abs=1e-6)


def test_v2_classification(classifier: ImageClassifier) -> None:
    """The k of the parameter, not that of the request."""
    asked = outputs("probabilities", classification=2)
    [reply] = ask(classifier, v2(ONE, TWO, outputs=asked, parameters={"top_k": 1}))
    assert ok(reply)["outputs"] == [
        {
            "name": "probabilities",
            "datatype": "BYTES",
            "shape": [2, 2],
            "data": [
                "0.665241:0:heron",
                "0.244728:1:crane",
                "0.665241:1:crane",
                "0.244728:2:crane",
            ],
        }
    ]


# --- V2 with binary tensors


def test_v2_binary(classifier: ImageClassifier) -> None:
    whole = v2(ONE, TWO, parameters={"binary_data_output": True, "top_k": 2})
    [reply] = ask(classifier, whole)
    assert (reply.status, reply.content_type) == (200, OCTETS)
    length = int(reply.headers["Inference-Header-Content-Length"])
    document, tensors = json.loads(reply.body[:length]), reply.body[length:]
    assert [one["parameters"] for one in document["outputs"]] == [
        {"binary_data_size": 36},
        {"binary_data_size": 32},
        {"binary_data_size": 16},
        {"binary_data_size": 24},
    ]
    assert not [one for one in document["outputs"] if "data" in one]
    labels = b"\x05\0\0\0heron" + 3 * b"\x05\0\0\0crane"
    class_ids = b"".join(bytes([class_id]) + bytes(7) for class_id in (0, 1, 1, 2))
    assert tensors[:68] == labels + class_ids
    confidences = struct.unpack("<4f", tensors[68:84])
    assert confidences == pytest.approx([HIGH, MIDDLE, HIGH, MIDDLE], abs=1e-7)
    assert sum(struct.unpack("<6f", tensors[84:])) == pytest.approx(2)


def test_v2_some_outputs_in_binary(classifier: ImageClassifier) -> None:
    """The tensors follow in the order of the outputs, and those in the JSON are none of them."""
    asked = [
        *outputs("probabilities", binary_data=True, classification=1),
        *outputs("label"),
        *outputs("class_id", binary_data=True),
    ]
    [reply] = ask(classifier, v2(ONE, outputs=asked, parameters={"top_k": 1}))
    length = int(reply.headers["Inference-Header-Content-Length"])
    classified, label, class_id = json.loads(reply.body[:length])["outputs"]
    assert classified["parameters"] == {"binary_data_size": 20}
    assert label["data"] == ["heron"]
    assert class_id["parameters"] == {"binary_data_size": 8}
    assert reply.body[length:] == b"\x10\0\0\x000.665241:0:heron" + bytes(8)


def test_v2_binary_in(classifier: ImageClassifier) -> None:
    data = b"".join(struct.pack("<I", len(image)) + image for image in (ONE, TWO))
    size = {"binary_data_size": len(data)}
    tensor = {"name": "image", "shape": [2], "datatype": "BYTES", "parameters": size}
    text = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    [reply] = ask(classifier, {"body": bytearray(text + data)}, headers=headers)
    [json_reply] = ask(classifier, v2(ONE, TWO))
    assert ok(reply) == ok(json_reply)


# --- Pixels


def test_pixels_get_the_answer_of_their_png(classifier: ImageClassifier) -> None:
    [reply] = ask(classifier, pixels(FIRST, SECOND))
    [png] = ask(classifier, v2(ONE, TWO))
    assert ok(reply) == ok(png)


def test_pixels_of_another_shape_are_another_image(model_dir: Path) -> None:
    """In one batch, and with a cache: the same 144 bytes, as 8 x 6 and as 6 x 8 pixels."""
    classifier = start(model_dir, cache_bytes=2**20)
    counted = Counted(classifier)
    classifier.engine = engine = Fake()
    wide, high = pixels(FIRST), pixels(FIRST, size=(6, 8))
    ask(classifier, wide, high, wide)
    assert engine.batches == [2]
    ask(classifier, wide, high)
    assert engine.batches == [2]
    assert counted.read("cache_lookups_total") == {"miss": 3, "hit": 2}


def test_a_file_of_the_same_bytes_is_another_image(model_dir: Path) -> None:
    """A BMP of 2 x 12 pixels has 150 bytes, which are also 5 x 10 pixels."""
    classifier = start(model_dir, cache_bytes=2**20)
    classifier.engine = engine = Fake()
    file = encode(plain(FIRST, (2, 12)), "BMP")
    assert len(file) == 150
    tensor = {"name": "image", "shape": [1, 5, 10, 3], "datatype": "UINT8", "data": [*file]}
    row = {"body": {"inputs": [tensor]}}
    file_reply, pixels_reply = ask(classifier, v2(file), row)
    assert engine.batches == [2]
    assert ok(file_reply) != ok(pixels_reply)
    again = ask(classifier, row, v2(file))
    assert [ok(reply) for reply in again] == [ok(pixels_reply), ok(file_reply)]
    assert engine.batches == [2]


@pytest.mark.parametrize(
    ("limit", "error"),
    [
        ({"max_image_bytes": 143}, "ImageTooLarge: the image has 144 bytes, the limit is 143"),
        (
            {"max_image_pixels": 47},
            "TooManyPixels: the image has 8x6 pixels, the limit for a request is 47",
        ),
    ],
)
def test_pixels_have_the_limits_of_images(
    model_dir: Path, limit: dict[str, Any], error: str
) -> None:
    [reply] = ask(start(model_dir, **limit), pixels(FIRST))
    assert (reply.status, reply.body) == (413, {"error": error})


def test_the_images_of_a_request_share_the_budget(model_dir: Path) -> None:
    [reply] = ask(start(model_dir, max_image_pixels=95), pixels(FIRST, SECOND))
    assert reply.status == 413
    assert reply.body["error"].startswith("TooManyPixels: image 1: the image has 8x6 pixels")


# --- Errors


def refused(reply: Reply) -> tuple[int, str]:
    assert reply.content_type == JSON
    assert list(reply.body) == ["error"]
    return reply.status, reply.body["error"]


@pytest.mark.parametrize("request_of", [v1, v2])
def test_an_image_that_fails_fails_the_request(
    classifier: ImageClassifier, request_of: Any
) -> None:
    counted = Counted(classifier)
    [reply] = ask(classifier, request_of(ONE, TWO, BAD, ONE))
    message = "UnreadableImage: image 2: 12 bytes could not be read as an image"
    assert refused(reply) == (400, message)
    assert counted.read("images_total") == {"success": 3, "UnreadableImage": 1}
    assert counted.read("requests_total") == {"400": 1}


@pytest.mark.parametrize("request_of", [v1, v2])
def test_the_only_image_needs_no_number(classifier: ImageClassifier, request_of: Any) -> None:
    [reply] = ask(classifier, request_of(BAD))
    assert refused(reply) == (400, "UnreadableImage: 12 bytes could not be read as an image")


@pytest.mark.parametrize(
    ("images", "status", "beginning"),
    [
        ([BAD, SVG, ONE], 415, "UnsupportedFormat: image 1: SVG is not served"),
        ([SVG, BAD, SVG], 415, "UnsupportedFormat: image 0: SVG is not served"),
        ([ONE, b"", BAD], 400, "NoImage: image 1: the image is empty"),
    ],
)
def test_the_highest_status_counts_and_the_first_of_equal_ones(
    classifier: ImageClassifier, images: list[bytes], status: int, beginning: str
) -> None:
    for request_of in (v1, v2):
        [reply] = ask(classifier, request_of(*images))
        assert refused(reply)[0] == status
        assert refused(reply)[1].startswith(beginning)


LATE = {"X-Request-Timeout": "0"}
REFUSED: list[tuple[dict[str, Any], dict[str, str], int, str]] = [
    ({"body": {"instances": []}}, {}, 400, "NoImage: 'instances' is empty"),
    ({"body": b"{"}, {"X-Protocol": "v1"}, 400, "MalformedRequest: the body is not valid JSON"),
    ({"body": b"{"}, {"x-protocol": "v2"}, 400, "MalformedRequest: the body is not valid JSON"),
    (v1(ONE, top_k=4), {}, 400, "InvalidTopK: top_k must be a whole number from 1 to 3"),
    (v2(ONE, parameters={"top_k": 0}), {}, 400, "InvalidTopK: top_k must be"),
    (v2(ONE, outputs=outputs("logits")), {}, 400, "MalformedRequest: each of 'outputs' must"),
    (
        v1(ONE),
        {"explain": "True"},
        400,
        "MalformedRequest: answers of squeezenet1_1 cannot be explained",
    ),
    (v1(ONE), LATE, 504, "DeadlineExceeded: the time that the request had is over"),
    (
        {"body": bytearray(json.dumps(v2(ONE)["body"]).encode())},
        LATE,
        504,
        "DeadlineExceeded: the time that the request had is over",
    ),
    ({"body": ONE}, {"X-Protocol": "v2"} | LATE, 504, "DeadlineExceeded: the time that"),
]


@pytest.mark.parametrize(("row", "headers", "status", "beginning"), REFUSED)
def test_requests_refused_as_a_whole(
    classifier: ImageClassifier,
    row: dict[str, Any],
    headers: dict[str, str],
    status: int,
    beginning: str,
) -> None:
    [reply] = ask(classifier, row, headers=headers)
    assert refused(reply)[0] == status
    assert refused(reply)[1].startswith(beginning)


def test_our_own_failures_have_the_form_too(
    classifier: ImageClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier.engine = Fake(broken)
    replies = ask(classifier, v1(ONE), v2(TWO), {"body": ONE})
    assert [reply.status for reply in replies] == [500, 500, 500]
    assert [reply.body.get("error") for reply in replies] == [
        "ModelFailed: the model failed",
        "ModelFailed: the model failed",
        None,
    ]

    def bug(*_: Any) -> None:
        raise KeyError("a bug of ours")

    monkeypatch.setattr(handler.image_classifier, "read_request", bug)
    [reply] = ask(classifier, v1(ONE))
    assert refused(reply) == (500, "ModelFailed: the request could not be read")


# --- Neighbours


def test_requests_of_all_protocols_share_a_batch(classifier: ImageClassifier) -> None:
    counted = Counted(classifier)
    classifier.engine = engine = Fake()
    rows = [{"body": ONE}, v1(ONE, BAD), v2(ONE, TWO), pixels(FIRST), v1(TWO), v2(BAD), v1()]
    own, one_bad, two, raw, other, bad, none = ask(classifier, *rows)
    assert own.body["status"] == "success"
    assert refused(one_bad)[0] == refused(bad)[0] == refused(none)[0] == 400
    assert [one["shape"] for one in ok(two)["outputs"]] == [[2, 3]] * 4
    assert ok(raw)["outputs"][0]["data"] == ["heron", "crane", "crane"]
    assert ok(other)["predictions"] == [
        [prediction(1, HIGH), prediction(2, MIDDLE), prediction(0, LOW)]
    ]
    assert engine.batches == [3]  # the two files once each, and the pixels
    assert counted.read("top_class_total") == {"heron": 4, "crane": 2}
    assert counted.read("images_total") == {"success": 6, "UnreadableImage": 2, "NoImage": 1}


@pytest.mark.parametrize("name", ["body", "data"])
def test_what_torchserves_own_grpc_hands_over(classifier: ImageClassifier, name: str) -> None:
    """A map of bytes, without any header."""

    def row(document: dict[str, Any]) -> dict[str, bytearray]:
        return {name: bytearray(json.dumps(document["body"]).encode())}

    own = {"body": {"images": [b64(ONE), b64(BAD)]}}
    raw, several, options, first, second = ask(
        classifier,
        {name: bytearray(ONE)},
        row(own),
        {name: bytearray(ONE), "top_k": bytearray(b"1")},
        row(v1(ONE)),
        row(v2(ONE)),
    )
    assert raw.body["predictions"][0] == prediction(0, HIGH)
    assert several.body["status"] == "partial"
    assert several.body["results"][1]["code"] == 400
    assert options.body["predictions"] == [prediction(0, HIGH)]
    assert ok(first)["predictions"][0][0] == prediction(0, HIGH)
    assert ok(second)["outputs"][0]["data"][0] == "heron"
