"""Probabilities and errors to the JSON that clients read."""

import json

import pytest
import torch

from handler import errors
from handler.answers import best_classes, combine, encode, failure, success
from handler.errors import RequestError

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
    "OutOfResources": 507,
}


def answered(*codes: int) -> list[dict[str, object]]:
    """One result for each code; 200 is a success."""
    return [
        {"status": "success"} if code == 200 else {"status": "error", "code": code}
        for code in codes
    ]


def test_best_classes_come_first() -> None:
    assert best_classes(torch.tensor([0.1, 0.5, 0.05, 0.35]), 3, LABELS) == [
        {"class": "crane", "class_id": 1, "confidence": 0.5},
        {"class": "owl", "class_id": 3, "confidence": 0.35},
        {"class": "heron", "class_id": 0, "confidence": 0.1},
    ]


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_as_many_classes_as_wanted(top_k: int) -> None:
    assert len(best_classes(torch.full((4,), 0.25), top_k, LABELS)) == top_k


def test_classes_of_one_name_stay_two() -> None:
    best = best_classes(torch.tensor([0.1, 0.4, 0.4, 0.1]), 2, LABELS)
    assert [answer["class"] for answer in best] == ["crane", "crane"]
    assert {answer["class_id"] for answer in best} == {1, 2}


def test_confidence_is_a_plain_rounded_number() -> None:
    [answer] = best_classes(torch.tensor([2 / 3]), 1, LABELS)
    assert answer["confidence"] == 0.666667
    assert type(answer["confidence"]) is float
    assert type(answer["class_id"]) is int


def test_success_in_the_documented_order() -> None:
    answer = success([{"class": "owl"}], {"model": "birds"})
    assert list(answer.items()) == [
        ("status", "success"),
        ("predictions", [{"class": "owl"}]),
        ("metadata", {"model": "birds"}),
    ]


def test_every_error_has_its_documented_status() -> None:
    family = {kind.__name__: kind.status for kind in RequestError.__subclasses__()}
    assert family == STATUSES


@pytest.mark.parametrize("name", STATUSES)
def test_failure_says_what_is_wrong(name: str) -> None:
    error = getattr(errors, name)("what is wrong")
    assert list(failure(error).items()) == [
        ("status", "error"),
        ("code", STATUSES[name]),
        ("type", name),
        ("message", "what is wrong"),
    ]


@pytest.mark.parametrize(
    ("codes", "code", "status"),
    [
        ([200], 200, "success"),
        ([200, 200], 200, "success"),
        ([200, 400], 200, "partial"),
        ([500, 413, 200], 200, "partial"),
        ([400], 400, "error"),
        ([400, 400], 400, "error"),
        ([400, 415, 413], 415, "error"),
        ([400, 500], 500, "error"),
    ],
)
def test_several_images(codes: list[int], code: int, status: str) -> None:
    results = answered(*codes)
    assert combine(results) == (code, {"status": status, "results": results})


def test_answers_are_compact_utf8_json() -> None:
    answer = success([{"class": "Käuzchen \u2028"}], {"image_size": (4, 3)})
    data = encode(answer)
    assert type(data) is bytes
    assert b"\n" not in data
    assert json.loads(data)["predictions"] == [{"class": "Käuzchen \u2028"}]
    assert json.loads(data)["metadata"] == {"image_size": [4, 3]}
