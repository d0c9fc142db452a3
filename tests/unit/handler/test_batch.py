"""Batches through the real handler: one answer a row, equal images once."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

import handler.decoders
from handler.image_classifier import ImageClassifier
from handler.images import decode_picture
from tests.drawing import BLUE, GREEN, RED, encode, plain
from tests.unit.handler.worker import (
    JPEG,
    JSON,
    MULTIPART,
    PNG,
    Counted,
    Fake,
    Reply,
    ask,
    b64,
    broken,
    log,
    not_a_number,
    start,
    without_times,
)

pytestmark = pytest.mark.usefixtures("isolation")


# --- Batches


SMALL = encode(plain(GREEN, (8, 8)), "PNG")
LIMITS: dict[str, Any] = {"max_image_bytes": 1500, "max_image_pixels": 10_000, "max_images": 8}
BAD_ROWS: list[tuple[dict[str, Any], dict[str, str], int, str]] = [
    ({"body": b"not an image"}, {}, 400, "UnreadableImage"),
    ({"body": SMALL[: len(SMALL) // 2]}, {}, 400, "UnreadableImage"),
    ({}, {}, 400, "NoImage"),
    ({}, MULTIPART, 400, "MalformedRequest"),
    ({"body": b""}, {}, 400, "NoImage"),
    ({"file": b"", "top_k": b"1"}, MULTIPART, 400, "NoImage"),
    ({"body": b'{"image": '}, JSON, 400, "MalformedRequest"),
    ({"body": {"image": "%%%"}}, JSON, 400, "InvalidBase64"),
    ({"file": SMALL, "top_k": b"4"}, MULTIPART, 400, "InvalidTopK"),
    ({"body": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}, {}, 415, "UnsupportedFormat"),
    ({"body": bytes(2000)}, {}, 413, "ImageTooLarge"),
    ({"body": encode(plain(size=(200, 200)))}, {}, 413, "TooManyPixels"),
    ({"body": {"images": ["QQ=="] * 9}}, JSON, 413, "TooManyImages"),
    ({"body": SMALL}, {"explain": "True"}, 400, "MalformedRequest"),
]


def test_bad_rows_among_good_ones(model_dir: Path) -> None:
    classifier = start(model_dir, **LIMITS)
    classifier.engine = Fake()
    rows: list[Mapping[str, Any]] = [{"body": SMALL}]
    headers: list[Mapping[str, Any]] = [{}]
    for row, header, *_ in BAD_ROWS:
        rows += [row, {"body": SMALL}]
        headers += [header, {}]
    replies = ask(classifier, *rows, headers=headers)
    good, bad = replies[0::2], replies[1::2]
    assert [(reply.status, reply.error) for reply in bad] == [expected[2:] for expected in BAD_ROWS]
    assert [reply.status for reply in good] == [200] * (len(BAD_ROWS) + 1)
    assert {reply.body["predictions"][0]["class_id"] for reply in good} == {1}
    assert {reply.content_type for reply in replies} == {"application/json"}
    for reply in bad:
        assert list(reply.body) == ["status", "code", "type", "message"]
        assert (reply.body["status"], reply.body["code"]) == ("error", reply.status)


def test_a_batch_of_bad_rows_needs_no_model(classifier: ImageClassifier) -> None:
    classifier.engine = Fake()
    replies = ask(classifier, {"body": b"bad"}, {})
    assert [reply.status for reply in replies] == [400, 400]
    assert classifier.engine.batches == []


def test_every_row_gets_its_own_answer(classifier: ImageClassifier) -> None:
    """More images than one pass takes, some of them several to a row."""
    classifier.engine = Fake()

    def picture(colour: int, index: int) -> bytes:
        return encode(plain((RED, GREEN, BLUE)[colour % 3], (9 + index, 9)))

    expected = [(index * 7) % 3 for index in range(30)]
    rows = [
        {"body": {"images": [b64(picture(colour + turn, index)) for turn in range(3)]}}
        if index % 4 == 0
        else {"body": picture(colour, index)}
        for index, colour in enumerate(expected)
    ]
    replies = ask(classifier, *rows)
    for index, (colour, reply) in enumerate(zip(expected, replies, strict=True)):
        answers = reply.body.get("results", [reply.body])
        best = [answer["predictions"][0]["class_id"] for answer in answers]
        assert best == ([(colour + turn) % 3 for turn in range(3)] if index % 4 == 0 else [colour])
    assert classifier.engine.batches == [4] * 11 + [2]  # 30 + 2 * 8 images


def test_identical_images_of_a_batch_are_computed_once(classifier: ImageClassifier) -> None:
    classifier.engine = Fake()
    red, green = encode(plain(RED)), encode(plain(GREEN))
    replies = ask(
        classifier,
        {"body": red},
        {"body": green},
        {"body": {"images": [b64(red), b64(red)], "top_k": 1}},
        {"body": red},
    )
    assert classifier.engine.batches == [2]
    best = [reply.body["predictions"][0]["class_id"] for reply in replies if reply != replies[2]]
    assert best == [0, 1, 0]
    assert [one["predictions"][0]["class_id"] for one in replies[2].body["results"]] == [0, 0]
    assert not replies[3].body["metadata"]["cached"]


def test_images_that_only_seem_equal_are_not_confused(classifier: ImageClassifier) -> None:
    """Files of one length that end in the same bytes."""
    classifier.engine = Fake()
    colours = [RED, GREEN, BLUE]
    files = [encode(plain(colour), compress_level=0) + bytes(100) for colour in colours]
    assert len({(len(file), file[-100:]) for file in files}) == 1
    order = [0, 1, 0, 2, 1, 1, 0]
    replies = ask(classifier, *[{"body": files[index]} for index in order])
    assert [reply.body["predictions"][0]["class_id"] for reply in replies] == order


# --- Cache


def cached(reply: Reply) -> bool:
    return reply.body["metadata"]["cached"]


def test_no_cache_unless_asked_for(classifier: ImageClassifier) -> None:
    assert not any(cached(ask(classifier, {"body": JPEG})[0]) for _ in range(2))


def test_an_image_seen_before_is_not_computed_again(model_dir: Path) -> None:
    classifier = start(model_dir, cache_bytes=2**20)
    classifier.engine = Fake()
    [first] = ask(classifier, {"body": JPEG})
    [again] = ask(classifier, {"body": {"image": b64(JPEG), "top_k": 1}}, headers=JSON)
    [other] = ask(classifier, {"body": PNG})
    assert [cached(reply) for reply in (first, again, other)] == [False, True, False]
    assert classifier.engine.batches == [1, 1]
    assert again.body["predictions"] == first.body["predictions"][:1]
    assert again.body["metadata"]["image_size"] == [300, 200]
    assert again.body["metadata"]["inference_time"] == 0


def test_a_cached_image_shares_a_batch_with_a_new_one(model_dir: Path) -> None:
    classifier = start(model_dir, cache_bytes=2**20)
    [alone] = ask(classifier, {"body": JPEG})
    old, new = ask(classifier, {"body": JPEG}, {"body": PNG})
    assert (cached(old), cached(new)) == (True, False)
    assert old.body["predictions"] == alone.body["predictions"]


def test_a_health_check_asks_the_model_and_not_the_cache(model_dir: Path) -> None:
    classifier = start(model_dir, cache_bytes=2**20)
    counted = Counted(classifier)
    probe = {"X-Probe": "1"}
    ask(classifier, {"body": JPEG})
    assert ask(classifier, {"body": JPEG}, headers=probe)[0].status == 200
    classifier.engine = Fake(broken)
    assert ask(classifier, {"body": JPEG}, headers=probe)[0].status == 500
    assert counted.read("probes_total") == {"200": 1, "500": 1}
    assert counted.read("requests_total") == {"200": 1}


def test_what_failed_is_not_cached(model_dir: Path) -> None:
    classifier = start(model_dir, cache_bytes=2**20)
    engine, classifier.engine = classifier.engine, Fake(not_a_number)
    assert ask(classifier, {"body": JPEG})[0].status == 500
    classifier.engine = engine
    [reply] = ask(classifier, {"body": JPEG})
    assert (reply.status, cached(reply)) == (200, False)


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_an_image_seen_before_counts_in_the_budget(model_dir: Path, cache_bytes: int) -> None:
    """In the same request, or in the cache."""
    classifier = start(model_dir, cache_bytes=cache_bytes, max_image_pixels=300 * 200 + 1)
    assert ask(classifier, {"body": JPEG})[0].status == 200
    [reply] = ask(classifier, {"body": {"images": [b64(JPEG)] * 2}})
    assert [one.get("type") for one in reply.body["results"]] == [None, "TooManyPixels"]


# --- Several images in a request


CASES = [
    ("json", [JPEG], 200, "success"),
    ("json", [JPEG, b"bad"], 200, "partial"),
    ("json", [b"bad", b"<svg/>"], 415, "error"),
    ("parts", [JPEG, PNG], 200, "success"),
    ("parts", [b"bad", PNG], 200, "partial"),
]


@pytest.mark.parametrize(("form", "images", "status", "outcome"), CASES, ids=range(len(CASES)))
def test_several_images(
    classifier: ImageClassifier, form: str, images: list[bytes], status: int, outcome: str
) -> None:
    row: dict[str, Any] = {f"file{index}": image for index, image in enumerate(images)}
    if form == "json":
        row = {"body": {"images": [b64(image) for image in images]}}
    classifier.engine = Fake()
    [reply] = ask(classifier, row)
    assert (reply.status, reply.body["status"]) == (status, outcome)
    assert list(reply.body) == ["status", "results"]
    bad = {b"bad": "UnreadableImage", b"<svg/>": "UnsupportedFormat"}
    assert [result.get("type") for result in reply.body["results"]] == list(map(bad.get, images))
    for result, image in zip(reply.body["results"], images, strict=True):
        if image not in bad:
            [alone] = ask(classifier, {"body": image})
            assert without_times(result) == without_times(alone.body)


def test_empty_images_of_a_list_fail_alone(classifier: ImageClassifier) -> None:
    [reply] = ask(classifier, {"body": {"images": ["", b64(JPEG), 3]}})
    types = [result.get("type") for result in reply.body["results"]]
    assert types == ["NoImage", None, "MalformedRequest"]


# --- Several threads


def test_a_worker_with_several_threads_gives_the_same_answers(model_dir: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"body": JPEG},
        {"body": b"bad"},
        {"body": {"images": [b64(PNG), b64(JPEG[:-900])]}},
    ]

    def answers(threads: int) -> list[Any]:
        classifier = start(model_dir, threads=threads)
        classifier.engine = Fake()
        replies = ask(classifier, *rows)
        each = [(reply.status, reply.body.get("results", [reply.body])) for reply in replies]
        return [(status, [one.get("predictions", one) for one in all_]) for status, all_ in each]

    assert answers(3) == answers(1)


def test_waiting_for_decoding_is_preprocessing(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = decode_picture

    def slow(*args: Any) -> Any:
        time.sleep(0.3)
        return original(*args)

    monkeypatch.setattr(handler.decoders, "decode_picture", slow)
    for threads in (1, 2):
        caplog.clear()
        classifier = start(model_dir, threads=threads)
        classifier.engine = Fake()
        ask(classifier, {"body": JPEG})
        [line] = log(caplog, "request")
        assert 300 <= line["preprocess_ms"] <= line["total_ms"]
        assert line["inference_ms"] + 300 <= line["total_ms"]


def test_passes_begin_before_the_last_image_is_decoded(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an engine that works while others do: the last image waits until the first pass began."""
    begun = threading.Event()
    original = decode_picture
    last = encode(plain(RED, (9, 5)))

    class Asynchronous(Fake):
        def launch(self, images: Sequence[Tensor]) -> Callable[[], NDArray[np.float32]]:
            begun.set()
            return super().launch(images)

    def late(encoded: Any, *args: Any) -> Any:
        assert encoded.data != last or begun.wait(30)
        return original(encoded, *args)

    monkeypatch.setattr(handler.decoders, "decode_picture", late)
    classifier = start(model_dir, threads=2)
    classifier.engine = Asynchronous()
    replies = ask(classifier, *[{"body": encode(plain(RED, (9, side)))} for side in range(1, 6)])
    assert [reply.status for reply in replies] == [200] * 5
