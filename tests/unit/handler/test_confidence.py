"""Calibrated answers, sets and unknown images: the numbers, and what each protocol says."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from handler.confidence import (
    CONFIDENCE_FILE,
    Confidence,
    calibrate,
    describe_answer,
    describe_pixels,
)
from handler.image_classifier import ImageClassifier
from handler.model_card import CARD_FILE, ConfidenceFacts, ModelCard, file_sha256
from tests.drawing import encode, noise
from tests.unit.handler.worker import JPEG, JSON, Fake, ask, b64, start
from tests.unit.tiny import LABELS, make_model_dir

SCORES = np.linspace(0, 0.99, 100).astype(np.float32)
FACTS = ConfidenceFacts(
    images=100,
    engine="torch-fp32",
    temperature=2.0,
    ece_before=0.1,
    ece_after=0.05,
    unknown_limit=40.0,
)


def softmax(logits: NDArray[Any]) -> NDArray[np.float32]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def confidence(scores: NDArray[np.float32] = SCORES) -> Confidence:
    return Confidence(1.0, scores, np.zeros(28, np.float32), np.eye(28, dtype=np.float32), 40.0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_probabilities_are_those_of_logits_over_the_temperature(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(0, 4, (20, 1000))
    calibrated = calibrate(softmax(logits), temperature)
    assert calibrated.dtype == np.float32
    np.testing.assert_allclose(calibrated, softmax(logits / temperature), rtol=1e-4, atol=1e-7)


def test_a_probability_of_zero_stays_finite() -> None:
    calibrated = calibrate(np.array([[1, 0, 0]], np.float32), 20.0)
    assert np.isfinite(calibrated).all()
    assert calibrated.sum() == pytest.approx(1)


def test_a_set_is_never_empty_and_grows_with_the_level() -> None:
    rows = softmax(np.random.default_rng(0).normal(0, 2, (50, 30)))
    for row in rows:
        sets = [confidence().likely(row, level) for level in (0.5, 0.7, 0.9, 0.99)]
        assert sets[0]
        assert all(set(small) <= set(large) for small, large in pairwise(sets))
        assert [row[number] for number in sets[-1]] == sorted(row[sets[-1]], reverse=True)
    sure = confidence(np.zeros(100, np.float32))
    assert sure.likely(rows[0], 0.9) == [int(rows[0].argmax())]


def test_a_level_takes_the_score_of_its_rank() -> None:
    """Of 100 images, 0.9 needs that of the 91st, 0.99 that of the last."""
    row = np.array([0.05, 0.095, 0.105, 0.75], np.float32)
    assert confidence().likely(row, 0.9) == [3, 2]  # 1 - 0.105 <= 0.90 < 1 - 0.095
    assert confidence().likely(row, 0.99) == [3, 2, 1, 0]


def test_noise_looks_unlike_a_photograph_at_every_scale() -> None:
    rng = np.random.default_rng(0)
    flat = describe_pixels(np.full((3, 224, 224), 90, np.uint8))
    noisy = describe_pixels(rng.integers(0, 256, (3, 224, 224), dtype=np.uint8))
    assert flat.shape == noisy.shape == (24,)
    assert (noisy > flat).reshape(4, 2, 3)[:, 0].all()  # contrast
    assert describe_pixels(np.zeros((3, 299, 299), np.uint8)).shape == (24,)


def test_an_answer_in_numbers() -> None:
    even = np.full(4, 0.25, np.float32)
    np.testing.assert_allclose(describe_answer(even), [0, 0, np.log(4), np.log(0.25)], atol=1e-6)


# --- The handler


@pytest.fixture(scope="module")
def calibrated_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive whose photographs were all like JPEG: another picture of it is unknown."""
    folder = make_model_dir(tmp_path_factory.mktemp("calibrated"))
    pixels = np.asarray(noise((300, 200)).resize((224, 224))).transpose(2, 0, 1)
    center = np.concatenate([describe_pixels(pixels), np.zeros(4)]).astype(np.float32)
    looks = np.diag(np.r_[np.ones(24), np.zeros(4)]).astype(np.float32)
    save_file({"scores": SCORES, "center": center, "precision": looks}, folder / CONFIDENCE_FILE)
    card = ModelCard.read(folder)
    files = card.files | {CONFIDENCE_FILE: file_sha256(folder / CONFIDENCE_FILE)}
    card = replace(card, confidence=FACTS, files=files)
    (folder / CARD_FILE).write_text(card.to_json(), "utf-8")
    return folder


@pytest.fixture
def calibrated(calibrated_dir: Path, isolation: object) -> ImageClassifier:
    classifier = start(calibrated_dir, cache_bytes=10**6)
    classifier.engine = Fake()
    return classifier


def test_every_answer_is_calibrated_and_says_so(calibrated: ImageClassifier) -> None:
    [reply] = ask(calibrated, {"body": bytearray(JPEG)})
    assert reply.body["metadata"]["calibrated"] is True
    assert not {"set", "unknown"} & set(reply.body)
    calibrated.confidence, calibrated.cache = None, None
    [raw] = ask(calibrated, {"body": bytearray(JPEG)})
    assert raw.body["metadata"]["calibrated"] is False
    expected = calibrate(
        np.array([[one["confidence"] for one in raw.body["predictions"]]], np.float32), 2.0
    )
    got = [one["confidence"] for one in reply.body["predictions"]]
    np.testing.assert_allclose(got, expected[0], atol=1e-4)


FORMS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "multipart": ({"file": JPEG, "set": b"0.99", "unknown": b"true"}, {}),
    "json": ({"body": {"image": b64(JPEG), "set": 0.99, "unknown": True}}, JSON),
    "header": ({"body": bytearray(JPEG)}, {"X-Set": "0.99", "X-Unknown": "true"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_set_and_unknown_in_every_form(calibrated: ImageClassifier, form: str) -> None:
    row, headers = FORMS[form]
    [reply] = ask(calibrated, row, headers=headers)
    assert reply.status == 200, reply.body
    best = reply.body["predictions"]
    assert reply.body["set"] == [
        {name: one[name] for name in ("class", "class_id")} for one in best
    ]
    assert sorted(one["class"] for one in reply.body["set"]) == sorted(LABELS)
    assert reply.body["metadata"]["set_level"] == 0.99
    assert reply.body["unknown"] is False


def test_what_is_unlike_the_calibration_is_unknown(calibrated: ImageClassifier) -> None:
    black = encode(noise().point(lambda _: 0))
    headers = {"X-Unknown": "true"}
    assert [
        ask(calibrated, {"body": body}, headers=headers)[0].body["unknown"]
        for body in (black, JPEG)
    ] == [True, False]


def test_v1_and_v2(calibrated: ImageClassifier) -> None:
    parameters = {"set": True, "unknown": True, "top_k": 1}
    instances = {"instances": [b64(JPEG)] * 2, "parameters": parameters}
    image = {"name": "image", "datatype": "BYTES", "shape": [2], "data": [b64(JPEG)] * 2}
    inputs = {"inputs": [image], "parameters": parameters}
    v1, v2 = ask(calibrated, {"body": instances}, {"body": inputs}, headers=JSON)
    assert v1.body["unknown"] == [False, False]
    outputs = {one["name"]: one for one in v2.body["outputs"]}
    assert [json.loads(one) for one in outputs["set"]["data"]] == v1.body["set"]
    assert outputs["unknown"] == {
        "name": "unknown",
        "datatype": "BOOL",
        "shape": [2, 1],
        "data": [False, False],
    }


def test_v2_in_binary_as_grpc_asks_for_it(calibrated: ImageClassifier) -> None:
    image = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [b64(JPEG)]}
    parameters = {"set": 0.99, "unknown": True, "binary_data_output": True}
    document = {"inputs": [image], "parameters": parameters, "outputs": [{"name": "label"}]}
    [reply] = ask(calibrated, {"body": document}, headers=JSON)
    length = int(reply.headers["Inference-Header-Content-Length"])
    outputs = json.loads(reply.body[:length])["outputs"]
    assert [(one["name"], one["datatype"]) for one in outputs] == [
        ("label", "BYTES"),
        ("set", "BYTES"),
        ("unknown", "BOOL"),
    ]
    assert sum(one["parameters"]["binary_data_size"] for one in outputs) == len(reply.body[length:])
    assert reply.body[-1:] == b"\0"


def test_no_cache_answers_what_needs_pixels(calibrated: ImageClassifier) -> None:
    plain: dict[str, Any] = {"body": bytearray(JPEG)}
    ask(calibrated, plain)
    said = [
        ask(calibrated, plain, headers=headers)[0].body["metadata"]["cached"]
        for headers in ({}, {"X-Set": "true"}, {"X-Unknown": "true"})
    ]
    assert said == [True, True, False]


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"X-Set": "1"}, "set must be true, false or a number from 0.5 to 0.99"),
        ({"X-Set": "0.3"}, "set must be true, false or a number from 0.5 to 0.99"),
        ({"X-Unknown": "maybe"}, "unknown must be true or false"),
    ],
)
def test_what_cannot_be_asked(
    calibrated: ImageClassifier, headers: dict[str, str], message: str
) -> None:
    [reply] = ask(calibrated, {"body": bytearray(JPEG)}, headers=headers)
    assert (reply.status, reply.body["message"]) == (400, message)


@pytest.mark.parametrize("option", ["set", "unknown"])
def test_an_archive_without_calibration_says_how(
    model_dir: Path, isolation: object, option: str
) -> None:
    classifier = start(model_dir)
    [reply] = ask(classifier, {"body": {"image": b64(JPEG), option: True}}, headers=JSON)
    assert (reply.status, reply.body["type"]) == (400, "MalformedRequest")
    assert f"{option} needs" in reply.body["message"]
    assert "./scripts/package --calibrate DIR" in reply.body["message"]
    [reply] = ask(classifier, {"body": {"image": b64(JPEG), option: False}}, headers=JSON)
    assert reply.status == 200
