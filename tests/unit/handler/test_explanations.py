"""Why this answer: the map, where it lies in the image, and how it is asked for."""

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import handler.batch
from handler.explanations import Activation, Form, activation_map, explain
from handler.image_classifier import ImageClassifier
from handler.inspection import Inspection
from handler.torch_engine import TorchEager
from service.plan import EXPLANATION_BYTES
from tests.drawing import BLUE, GREEN, RED, encode, plain
from tests.unit.handler.worker import JPEG, JSON, Counted, Fake, Reply, ask, b64, log, start
from tests.unit.tiny import LABELS, tiny_card

COLOURS = (RED, GREEN, BLUE)
CELL = 32  # pixels of the model's input for each position of its maps
MULTIPART = {"content-type": "multipart/form-data; boundary=x"}
TRANSFORM = tiny_card().transform


def colour_network() -> nn.Module:
    """Class 0, 1 or 2 is that of which there is more: red, green or blue."""
    maps = nn.Conv2d(3, 3, CELL, stride=CELL, bias=False)
    head = nn.Linear(3, 3)
    with torch.no_grad():
        purity = 1.5 * torch.eye(3) - 0.5
        maps.weight.copy_((purity / CELL**2)[:, :, None, None].expand_as(maps.weight))
        head.weight.copy_(10 * torch.eye(3) + 0.1)
        head.bias.copy_(torch.tensor([0.5, 0, -0.5]))
    return nn.Sequential(maps, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


@pytest.fixture
def colours(classifier: ImageClassifier) -> ImageClassifier:
    classifier.engine = TorchEager(colour_network(), TRANSFORM)
    return classifier


def drawn(colour: tuple[int, int, int], box: tuple[int, int, int, int], size: Any) -> bytes:
    """An object of a colour on grey."""
    image = plain((124, 116, 104), size)  # the mean of the recipe
    image.paste(colour, box)
    return encode(image)


BOX = (230, 60, 320, 150)
OBJECT = drawn(RED, BOX, (400, 300))


def explanation(reply: Reply) -> dict[str, Any]:
    assert reply.status == 200, reply.body
    found: dict[str, Any] = reply.body["explanation"]
    return found


def strongest(found: dict[str, Any]) -> tuple[float, float]:
    """Where in the original image the map is highest: x and y of the position's centre."""
    values = np.array(found["map"])
    row, column = np.unravel_index(values.argmax(), values.shape)
    left, top, right, bottom = found["region"]
    height, width = values.shape
    x = left + (column + 0.5) / width * (right - left)
    return float(x), float(top + (row + 0.5) / height * (bottom - top))


# --- The map


@pytest.mark.parametrize("class_id", range(3))
@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((400, 300), (70, 40, 160, 130)),
        ((400, 300), (240, 150, 340, 250)),
        ((200, 700), (40, 380, 120, 430)),  # the crop is the middle of a tall image
        ((90, 60), (20, 30, 45, 55)),  # enlarged
    ],
)
def test_the_highest_place_lies_in_the_object(
    colours: ImageClassifier, class_id: int, size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    image = drawn(COLOURS[class_id], box, size)
    [reply] = ask(colours, {"body": image, "explain": b"matrix"})
    found = explanation(reply)
    assert (found["class_id"], found["class"], found["method"]) == (
        class_id,
        LABELS[class_id],
        "cam",
    )
    x, y = strongest(found)
    assert box[0] <= x <= box[2]
    assert box[1] <= y <= box[3]


def test_the_mean_of_the_map_and_the_bias_are_the_logit(colours: ImageClassifier) -> None:
    image = drawn(GREEN, BOX, (400, 300))
    bias = np.array([0.5, 0, -0.5])
    logits = []
    for class_id in range(3):
        row = {"body": {"image": b64(image), "explain": "matrix", "explain_class": class_id}}
        [reply] = ask(colours, row, headers=JSON)
        assert explanation(reply)["class_id"] == class_id
        logits.append(np.mean(explanation(reply)["map"]) + bias[class_id])
    confidences = {one["class_id"]: one["confidence"] for one in reply.body["predictions"]}
    expected = np.exp(logits) / np.exp(logits).sum()
    assert [confidences[class_id] for class_id in range(3)] == pytest.approx(expected, abs=1e-3)


def test_a_map_is_the_linear_layer_at_each_position() -> None:
    generator = torch.Generator().manual_seed(0)
    maps, weight = (torch.randn(*size, generator=generator) for size in ((1, 5, 2, 3), (4, 5)))
    bias = torch.zeros(4)
    seen = Inspection(torch.full((1, 4), 0.25), maps, weight, bias)
    for row in range(2):
        for column in range(3):
            expected = weight @ maps[0, :, row, column]
            actual = [activation_map(seen, class_id)[row, column] for class_id in range(4)]
            assert actual == pytest.approx(expected.tolist(), abs=1e-5)


# --- The overlay


def picture(found: dict[str, Any]) -> Image.Image:
    head, _, data = found["image"].partition(",")
    assert head == "data:image/png;base64"
    return Image.open(BytesIO(base64.b64decode(data)))


def test_the_overlay_shows_the_crop_and_is_bright_at_the_object(colours: ImageClassifier) -> None:
    [reply] = ask(colours, {"body": OBJECT, "explain": b"true"})
    found = explanation(reply)
    shown = picture(found)
    assert (shown.format, shown.size) == ("PNG", (224, 224))
    left, top, right, bottom = found["region"]
    inside = [
        round((middle - start) / (end - start) * 224)
        for middle, start, end in ((275, left, right), (105, top, bottom))
    ]
    levels = np.asarray(shown.convert("RGB"), np.int16)
    at_object, far_away = levels[inside[1], inside[0]], levels[200, 20]
    assert at_object[0] > 200  # half red of the object, half yellow
    assert far_away.tolist() == pytest.approx(
        [(124 + 68) / 2, (116 + 1) / 2, (104 + 84) / 2], abs=12
    )


def test_an_explanation_is_no_larger_than_planned() -> None:
    """Even of noise, at the largest crop of any recipe."""
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (3, 600, 600), np.uint8))
    maps = torch.rand(1, 2, 19, 19, generator=torch.Generator().manual_seed(0))
    seen = Inspection(torch.tensor([[0.4, 0.6]]), maps, torch.eye(2), torch.zeros(2))
    activation = Activation(1, activation_map(seen, 1))
    forms: tuple[Form, ...] = ("image", "matrix")
    for form in forms:
        found = explain(form, activation, pixels, [0, 0, 600, 600], ("a", "b" * 1000))
        assert len(json.dumps(found)) < EXPLANATION_BYTES


# --- How it is asked for


def one(reply: Reply) -> Any:
    return reply.body["explanation"]


def first_of_v1(reply: Reply) -> Any:
    return reply.body["explanations"][0]


def first_of_v2(reply: Reply) -> Any:
    [tensor] = [each for each in reply.body["outputs"] if each["name"] == "explanation"]
    assert (tensor["datatype"], tensor["shape"]) == ("BYTES", [1, 1])
    return json.loads(tensor["data"][0])


V1 = {"instances": [{"b64": b64(OBJECT)}]}
V2 = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [b64(OBJECT)]}]}
MATRIX = {"parameters": {"explain": "matrix"}}
WAYS: list[tuple[Any, dict[str, str], Any]] = [
    ({"explain": bytearray(b"matrix"), "body": OBJECT}, {}, one),  # query of /M/predict
    ({"file": OBJECT, "explain": b"matrix"}, MULTIPART, one),
    ({"body": {"image": b64(OBJECT), "explain": "matrix"}}, JSON, one),
    ({"body": OBJECT}, {"X-Explain": "matrix"}, one),  # as the gateway passes on a query
    ({"body": OBJECT}, {"explain": "True", "X-Explain": "matrix"}, one),  # /explanations/M
    ({"body": V1 | MATRIX}, JSON, first_of_v1),
    ({"body": V2 | MATRIX}, JSON, first_of_v2),
]


@pytest.mark.parametrize(("row", "headers", "read"), WAYS)
def test_each_form_of_a_request_gets_the_same(
    colours: ImageClassifier, row: Any, headers: dict[str, str], read: Any
) -> None:
    [reply] = ask(colours, row, headers=headers)
    [expected] = ask(colours, WAYS[0][0])
    assert reply.status == 200, reply.body
    assert read(reply) == one(expected)


@pytest.mark.parametrize(
    ("row", "read"),
    [({"body": OBJECT}, one), ({"body": V1}, first_of_v1), ({"body": V2}, first_of_v2)],
)
def test_torchserves_explanations_give_an_overlay(
    colours: ImageClassifier, row: Any, read: Any
) -> None:
    [reply] = ask(colours, row, headers={"explain": "True"})
    assert picture(read(reply)).size == (224, 224)


def test_each_of_several_images_has_its_own(colours: ImageClassifier) -> None:
    images = [drawn(colour, BOX, (400, 300)) for colour in COLOURS]
    row = {"body": {"images": [*map(b64, images), "QQ=="], "explain": "matrix"}}
    [reply] = ask(colours, row, headers=JSON)
    *good, bad = reply.body["results"]
    assert [result["explanation"]["class_id"] for result in good] == [0, 1, 2]
    assert bad["status"] == "error"
    assert "explanation" not in bad


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"explain": "yes"}, "explain must be true, false, 'image' (as true) or 'matrix'"),
        ({"explain": 1}, "explain must be"),
        ({"explain": []}, "explain must be"),
        ({"explain": True, "explain_class": 3}, "explain_class must be a class_id from 0 to 2"),
        ({"explain": True, "explain_class": -1}, "explain_class must be"),
        ({"explain": True, "explain_class": True}, "explain_class must be"),
        ({"explain": True, "explain_class": "٣"}, "explain_class must be"),
        ({"explain": False, "explain_class": 3}, "explain_class must be"),
    ],
)
def test_options_that_make_no_sense(
    colours: ImageClassifier, options: dict[str, Any], words: str
) -> None:
    [reply] = ask(colours, {"body": {"image": b64(OBJECT)} | options}, headers=JSON)
    assert (reply.status, reply.error) == (400, "MalformedRequest")
    assert reply.body["message"].startswith(words)


@pytest.mark.parametrize("more", [{}, {"explain_class": b"1"}, {"explain": b" False"}])
def test_false_asks_for_nothing(classifier: ImageClassifier, more: dict[str, bytes]) -> None:
    [reply] = ask(classifier, {"body": JPEG, "explain": b"false"} | more)
    assert reply.status == 200
    assert "explanation" not in reply.body


def test_a_class_alone_asks_for_its_overlay(colours: ImageClassifier) -> None:
    [reply] = ask(colours, {"body": OBJECT, "explain_class": b"2"})
    assert explanation(reply)["class_id"] == 2
    assert picture(explanation(reply)).format == "PNG"


# --- Beside others


class Watched(Fake):
    """Says what was inspected, and can fail at it."""

    inspectable = True
    error: Exception | None = None

    def __init__(self) -> None:
        super().__init__()
        self.inspected: list[int] = []

    def inspect(self, images: Tensor) -> Inspection:
        self.inspected.append(len(images))
        if self.error:
            raise self.error
        maps = images.float()[:, :, ::32, ::32]
        return Inspection(self.probabilities(images), maps, torch.eye(3), torch.zeros(3))


@pytest.fixture
def watched(model_dir: Path, isolation: list[object]) -> ImageClassifier:
    classifier = start(model_dir, cache_bytes=2**20)
    classifier.engine = Watched()
    return classifier


EXPLAINED = {"body": OBJECT, "explain": b"true"}
PLAIN = {"body": OBJECT}


def test_neighbours_are_untouched_and_no_cache_is_asked(watched: ImageClassifier) -> None:
    """Though all of them send the same image."""
    engine = watched.engine
    assert isinstance(engine, Watched)
    replies = ask(watched, EXPLAINED, PLAIN, EXPLAINED, PLAIN)
    assert ["explanation" in reply.body for reply in replies] == [True, False, True, False]
    assert engine.inspected == [1]
    again = ask(watched, EXPLAINED, PLAIN)
    assert [reply.body["metadata"]["cached"] for reply in again] == [False, True]
    assert engine.inspected == [1, 1]


@pytest.mark.parametrize(
    ("error", "status"),
    [(torch.OutOfMemoryError("none left"), 507), (RuntimeError("in /opt/secret"), 500)],
)
def test_a_failure_is_that_of_who_asked(
    watched: ImageClassifier, error: Exception, status: int
) -> None:
    assert isinstance(watched.engine, Watched)
    watched.engine.error = error
    explained, other = ask(watched, EXPLAINED, PLAIN)
    assert (explained.status, other.status) == (status, 200)
    assert "secret" not in explained.body["message"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(torch.OutOfMemoryError("none left"), 507), (RuntimeError("in /opt/secret"), 500)],
)
def test_a_failure_of_the_first_pass_is_that_of_who_asked(
    colours: ImageClassifier, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    """It finds out whether answers can be explained, and is asked again if it could not."""
    with monkeypatch.context() as patch:
        patch.setattr(colours.engine, "_prepare_inspection", Mock(side_effect=error))
        explained, other = ask(colours, EXPLAINED, PLAIN)
    assert (explained.status, other.status) == (status, 200)
    assert "secret" not in explained.body["message"]
    assert explanation(*ask(colours, EXPLAINED))


def test_an_explanation_that_fails_is_in_the_accounts(
    watched: ImageClassifier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counted = Counted(watched)
    monkeypatch.setattr(handler.batch, "explain", Mock(side_effect=RuntimeError))
    explained, other = ask(watched, EXPLAINED, PLAIN)
    assert (explained.status, explained.error, other.status) == (500, "ModelFailed", 200)
    lines = {line["status"]: line for line in log(caplog, "request")}
    assert (lines[500]["error"], lines[200]["error"]) == ("ModelFailed", None)
    assert counted.read("images_total") == {"ModelFailed": 1, "success": 1}


def test_a_deadline_holds(watched: ImageClassifier) -> None:
    [reply] = ask(watched, EXPLAINED, headers={"X-Request-Timeout": "0"})
    assert reply.status == 504
