"""Probabilities and errors to the JSON that clients read."""

import json
import random

import numpy as np
import pytest

from handler.answers import (
    MAX_HEADER_LENGTH,
    Answer,
    best_class_ids,
    best_classes,
    combine,
    encode,
    failure,
    success,
)
from handler.errors import RequestError, TooManyPixels

LABELS = ("heron", "crane", "crane", "owl")
STATUSES = {
    "MalformedRequest": 400,
    "NoImage": 400,
    "UnreadableImage": 400,
    "InvalidTopK": 400,
    "InvalidBase64": 400,
    "ImageTooLarge": 413,
    "TooManyPixels": 413,
    "TooManyImages": 413,
    "UnsupportedFormat": 415,
    "ModelFailed": 500,
    "DeadlineExceeded": 504,
    "OutOfResources": 507,
}


def test_best_classes_come_first() -> None:
    """Classes of one name stay two, and those of equal probability stay in order."""
    assert best_classes(np.array([0.05, 0.375, 0.375, 0.2], np.float32), 3, LABELS) == [
        {"class": "crane", "class_id": 1, "confidence": 0.375},
        {"class": "crane", "class_id": 2, "confidence": 0.375},
        {"class": "owl", "class_id": 3, "confidence": 0.2},
    ]


def test_the_order_is_the_same_whatever_top_k_is() -> None:
    """Best first, then in the order of the classes, of which most have an equal here."""
    values = random.Random(0).choices([0.0, 0.125, 0.25, 0.5], k=1000)
    expected = sorted(range(1000), key=lambda class_id: (-values[class_id], class_id))
    for top_k in (1, 5, 300, 1000):
        best = best_classes(np.array(values, np.float32), top_k, ["owl"] * 1000)
        assert [one["class_id"] for one in best] == expected[:top_k]


def test_confidence_is_a_plain_rounded_number() -> None:
    [answer] = best_classes(np.array([2 / 3], np.float32), 1, LABELS)
    assert answer["confidence"] == 0.666667
    assert type(answer["confidence"]) is float
    assert type(answer["class_id"]) is int


def test_every_error_has_its_documented_status() -> None:
    family = {kind.__name__: kind.status for kind in RequestError.__subclasses__()}
    assert family == STATUSES


def test_failure_says_what_is_wrong() -> None:
    assert list(failure(TooManyPixels("what is wrong")).items()) == [
        ("status", "error"),
        ("code", 413),
        ("type", "TooManyPixels"),
        ("message", "what is wrong"),
    ]


@pytest.mark.parametrize(
    ("codes", "code", "status"),
    [
        ([200, 200], 200, "success"),
        ([500, 413, 200], 200, "partial"),
        ([400], 400, "error"),
        ([400, 415, 413], 415, "error"),
    ],
)
def test_several_images(codes: list[int], code: int, status: str) -> None:
    results: list[Answer] = [
        {"status": "success"} if code == 200 else {"status": "error", "code": code}
        for code in codes
    ]
    assert combine(results) == (code, {"status": status, "results": results})


def test_answers_are_compact_utf8_json() -> None:
    answer = success([{"class": "Käuzchen \u2028"}], {"image_size": (4, 3)})
    data = encode(answer)
    assert type(data) is bytes
    assert b"\n" not in data
    assert json.loads(data)["predictions"] == [{"class": "Käuzchen \u2028"}]
    assert json.loads(data)["metadata"] == {"image_size": [4, 3]}


def test_best_class_ids_name_each_image() -> None:
    def of(class_id: int) -> Answer:
        return success([{"class": "crane", "class_id": class_id, "confidence": 1.0}], {})

    assert best_class_ids([of(1), failure(TooManyPixels("x")), of(20)]) == "1,-,20"
    assert best_class_ids([failure(TooManyPixels("x"))]) == "-"
    assert len(best_class_ids([of(99)] * 333)) == 998 <= MAX_HEADER_LENGTH
    assert best_class_ids([of(99)] * 334) == "", "it would be cut off"
