"""How answers are read and checked."""

import math
from typing import Any

import pytest

from service.load.answers import Expectations, read_predictions, without_tensor_header


def answer(*classes: str, confidence: float = 0.9) -> dict[str, Any]:
    return {
        "predictions": [
            {"class": name, "confidence": confidence / 2**index}
            for index, name in enumerate(classes)
        ]
    }


@pytest.mark.parametrize(
    "document",
    [
        answer("cat", "dog", confidence=0.5),
        {"cat": 0.5, "dog": 0.25},
        [{"class": "cat", "confidence": 0.5}, {"class": "dog", "confidence": 0.25}],
        {"status": "success", "results": [answer("cat", "dog", confidence=0.5), answer("cow")]},
    ],
    ids=["ours", "stock", "list", "results"],
)
def test_answers_in_every_shape(document: Any) -> None:
    assert read_predictions(document) == [("cat", 0.5), ("dog", 0.25)]


@pytest.mark.parametrize(
    "document",
    [
        None,
        3,
        "cat",
        {"code": 503, "type": "x"},
        {"predictions": [{"class": "cat"}]},
        {"status": "partial", "results": [answer("cat"), {"status": "error", "code": 400}]},
    ],
)
def test_no_answer(document: Any) -> None:
    assert read_predictions(document) == []


def test_an_answer_in_the_binary_protocol_of_triton() -> None:
    header, text = b'{"outputs": []}', b'{"cat": 0.5}'
    content = header + len(text).to_bytes(4, "little") + text
    headers = {"Inference-Header-Content-Length": str(len(header))}
    assert without_tensor_header(content, headers) == text
    assert without_tensor_header(text, {}) == text


@pytest.mark.parametrize(
    ("predictions", "problem"),
    [
        ([("cat", 0.9), ("dog", 0.1)], None),
        ([("dog", 0.9), ("cat", 0.1)], "WrongClass"),
        ([("dog", 0.50), ("cat", 0.49)], None),  # a tie that rounding may turn
        ([("cat", 0.1), ("dog", 0.9)], "Unsorted"),
        ([("cat", 1.2)], "NoProbabilities"),
        ([("cat", math.nan)], "NoProbabilities"),
        ([], "NoPredictions"),
    ],
)
def test_checking_an_answer(predictions: list[tuple[str, float]], problem: str | None) -> None:
    assert Expectations({"a.jpg": "cat"}).problem("a.jpg", predictions) == problem


def test_the_first_answer_is_expected_again() -> None:
    expectations = Expectations()
    assert expectations.problem("a.jpg", [("cat", 0.9)]) is None
    assert expectations.problem("b.jpg", [("dog", 0.9)]) is None
    assert expectations.problem("a.jpg", [("dog", 0.9)]) == "WrongClass"


def test_classes_that_say_nothing_are_not_compared() -> None:
    expectations = Expectations(classes=False)
    assert expectations.problem("a.jpg", [("cat", 0.9)]) is None
    assert expectations.problem("a.jpg", [("dog", 0.9)]) is None
    assert expectations.problem("a.jpg", [("dog", 1.9)]) == "NoProbabilities"
