"""The real handler with TorchServe's own context objects: batches in, one answer a row out."""

import base64
import json
import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from ts.context import Context, RequestProcessor
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.service import Service
from ts.utils.util import list_classes_from_module

import handler
import handler.decoders
import handler.image_classifier
from handler.engines import Engine
from handler.image_classifier import ImageClassifier
from handler.images import decode_picture
from handler.metrics import Metrics
from handler.model_card import CARD_FILE
from tests.drawing import BLUE, GREEN, RED, encode, noise, plain
from tests.unit.tiny import LABELS, RECIPE, make_model_dir

METRICS_CONFIG = Path(handler.__file__).parent / "configs" / "metrics.yaml"
JPEG = encode(noise((300, 200)), "JPEG")
PNG = encode(noise((200, 300), seed=1), "PNG")
JSON = {"Content-Type": "application/json"}
MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}
QUICK = {"device": "cpu", "threads": 1, "warmup_batches": 0}
REQUEST_KEYS = [
    *("time", "level", "event", "request_id", "traceparent", "model", "version", "weights"),
    *("status", "images", "cached", "batch", "queue_ms", "preprocess_ms", "inference_ms"),
    *("postprocess_ms", "total_ms", "top_class", "confidence", "error"),
]


@dataclass
class Reply:
    """What TorchServe would send to one client."""

    status: int
    phrase: str
    content_type: str | None
    body: Any

    @property
    def error(self) -> str | None:
        return self.body.get("type")


class Fake(Engine):
    """An engine that answers by colour: class 0, 1 or 2 for red, green or blue."""

    name, precision, device, max_forward = "fake-fp32", "fp32", "cpu", 4

    def __init__(self, fail: Callable[[Tensor], Tensor] | None = None) -> None:
        self.batches: list[int] = []
        self.fail = fail

    def probabilities(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        if self.fail:
            return self.fail(images)
        return (images.float().mean(dim=(2, 3)) / 25).softmax(dim=1)


def broken(_: Tensor) -> Tensor:
    raise RuntimeError("cuDNN says no at 0x7f00 in /opt/secret")


def not_a_number(images: Tensor) -> Tensor:
    return torch.full((len(images), 3), float("nan"))


def one_too_few(images: Tensor) -> Tensor:
    return torch.full((len(images) - 1, 3), 1 / 3)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def isolation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[list[Metrics]]:
    """No flushing threads, and the root logger as it was; gives what would have been started."""
    started: list[Metrics] = []
    monkeypatch.setattr(Metrics, "start", lambda metrics: started.append(metrics))
    caplog.set_level(logging.INFO)
    filters = list(logging.getLogger().filters)
    yield started
    logging.getLogger().filters[:] = filters


def make_context(folder: Path, config: Mapping[str, Any] | None = None, **settings: Any) -> Context:
    """A worker's context as TorchServe makes it."""
    yaml = dict(config or {}) | {"handler": QUICK | settings}
    manifest = {"model": {"modelVersion": "1.0", "modelName": "birds"}}
    return Context("birds", str(folder), manifest, 8, None, "0.12.0", model_yaml_config=yaml)


def start(
    folder: Path, config: Mapping[str, Any] | None = None, **settings: Any
) -> ImageClassifier:
    classifier = ImageClassifier()
    classifier.initialize(make_context(folder, config, **settings))
    return classifier


@pytest.fixture
def classifier(model_dir: Path) -> ImageClassifier:
    return start(model_dir)


def ask(
    classifier: ImageClassifier,
    *rows: Mapping[str, Any],
    headers: Mapping[str, Any] | Sequence[Mapping[str, Any]] = (),
) -> list[Reply]:
    """Hand over a batch as TorchServe does; `headers` are for all rows, or one for each."""
    each = [headers] * len(rows) if isinstance(headers, Mapping) else headers or [{}] * len(rows)
    context = classifier.context
    context.request_ids = {index: f"id-{index}" for index in range(len(rows))}
    context.request_processor = [RequestProcessor(dict(one)) for one in each]
    bodies = classifier.handle(list(rows), context)
    assert len(bodies) == len(rows)
    return [
        Reply(status, phrase, context.get_response_content_type(index), json.loads(body))
        for index, body in enumerate(bodies)
        for status, phrase in [context.get_response_status(index)]
    ]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def log(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    messages = [record.getMessage() for record in caplog.records if record.name == "classifier"]
    assert not any("\n" in message for message in messages)
    return [line for line in map(json.loads, messages) if line["event"] == event]


def without_times(answer: dict[str, Any]) -> dict[str, Any]:
    metadata = answer["metadata"] | {"inference_time": 0, "request_id": ""}
    return answer | {"metadata": metadata}


# --- TorchServe's rules


def test_the_module_has_one_class() -> None:
    """TorchServe refuses any other number."""
    assert list_classes_from_module(handler.image_classifier) == [ImageClassifier]


def test_torchserves_own_service_takes_the_answers(model_dir: Path) -> None:
    """The batch as it comes from the socket, the reply as it goes back."""
    classifier = ImageClassifier()
    manifest = {"model": {"modelVersion": "1.0"}}
    arguments = ("birds", str(model_dir), manifest, classifier.handle, None, 8)
    metrics = MetricsCacheYamlImpl(config_file_path=str(METRICS_CONFIG))
    metrics.initialize_cache()
    service = Service(*arguments, metrics_cache=metrics)
    classifier.initialize(service.context)
    service.set_cl_socket(None)
    reply = service.predict(
        [
            {
                "requestId": b"id-0",
                "headers": [{"name": b"X-Top-K", "value": b"1"}],
                "parameters": [
                    {"name": "body", "contentType": "image/jpeg", "value": bytearray(JPEG)}
                ],
            },
            {
                "requestId": b"id-1",
                "headers": [{"name": b"Content-Type", "value": b"multipart/form-data"}],
                "parameters": [
                    {"name": "file", "contentType": "image/png", "value": bytearray(PNG)},
                    {"name": "top_k", "contentType": "text/plain", "value": "9"},
                ],
            },
            {"requestId": b"id-2", "headers": [], "parameters": []},
        ]
    )
    assert struct.unpack("!i", reply[:4]) == (200,)
    assert [reply.count(b"id-%d" % index) >= 1 for index in range(3)] == [True] * 3
    assert reply.count(b"application/json") >= 3
    assert b'"top_k must be a whole number from 1 to 3"' in reply
    assert b'"type":"NoImage"' in reply


def test_phrases_stay_empty(classifier: ImageClassifier) -> None:
    """TorchServe loses step with the worker over others."""
    replies = ask(classifier, {"body": JPEG}, {"body": b"x"})
    assert [reply.phrase for reply in replies] == ["", ""]


# --- One image


def test_answer_of_one_image(classifier: ImageClassifier) -> None:
    row = {"file": bytearray(JPEG), "filename": b"heron.jpg", "top_k": b"3"}
    [reply] = ask(classifier, row, headers=MULTIPART)
    assert (reply.status, reply.content_type) == (200, "application/json")
    assert list(reply.body) == ["status", "predictions", "metadata"]
    assert reply.body["status"] == "success"
    predictions = reply.body["predictions"]
    assert [list(prediction) for prediction in predictions] == [
        ["class", "class_id", "confidence"]
    ] * 3
    assert sorted(prediction["class_id"] for prediction in predictions) == [0, 1, 2]
    assert all(LABELS[one["class_id"]] == one["class"] for one in predictions)
    confidences = [prediction["confidence"] for prediction in predictions]
    assert confidences == sorted(confidences, reverse=True)
    assert sum(confidences) == pytest.approx(1, abs=1e-5)
    metadata = reply.body["metadata"]
    assert 0 < metadata.pop("inference_time") < 10
    assert metadata == {
        "filename": "heron.jpg",
        "model": "birds",
        "version": "1.0",
        "weights": "birds.pth",
        "device": "cpu",
        "engine": "torch-fp32",
        "image_size": [300, 200],
        "cached": False,
        "request_id": "id-0",
    }


def test_answer_is_the_models(classifier: ImageClassifier) -> None:
    [reply] = ask(classifier, {"body": PNG}, headers={"X-Top-K": "3"})
    image = noise((200, 300), seed=1)
    with torch.inference_mode():
        engine: Any = classifier.engine
        network = engine._model.network
        wanted = network(RECIPE.transforms()(image)[None]).softmax(dim=1)[0].tolist()
    for prediction in reply.body["predictions"]:
        assert prediction["confidence"] == pytest.approx(wanted[prediction["class_id"]], abs=1e-5)


@pytest.mark.parametrize("name", ["x-top-k", "X-Top-K", "X-TOP-K"])
def test_header_in_any_case(classifier: ImageClassifier, name: str) -> None:
    [reply] = ask(classifier, {"body": JPEG}, headers={name: "1"})
    assert len(reply.body["predictions"]) == 1


def test_top_k_of_the_settings(model_dir: Path) -> None:
    [reply] = ask(start(model_dir, top_k=2), {"body": JPEG})
    assert len(reply.body["predictions"]) == 2


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
    assert [(reply.status, reply.error) for reply in bad] == [wanted[2:] for wanted in BAD_ROWS]
    assert [reply.status for reply in good] == [200] * (len(BAD_ROWS) + 1)
    assert {reply.body["predictions"][0]["class_id"] for reply in good} == {1}
    assert {reply.content_type for reply in replies} == {"application/json"}
    for reply in bad:
        assert list(reply.body) == ["status", "code", "type", "message"]
        assert (reply.body["status"], reply.body["code"]) == ("error", reply.status)


def test_a_bad_neighbour_harms_nobody(classifier: ImageClassifier) -> None:
    [alone] = ask(classifier, {"body": JPEG})
    replies = ask(classifier, {"body": b"bad"}, {"body": JPEG}, {}, {"body": PNG}, {"body": [3]})
    assert [reply.status for reply in replies] == [400, 200, 400, 200, 400]
    among = replies[1].body
    for ours, theirs in zip(among["predictions"], alone.body["predictions"], strict=True):
        assert ours["class_id"] == theirs["class_id"]
        assert ours["confidence"] == pytest.approx(theirs["confidence"], abs=1e-5)
    assert among["metadata"]["request_id"] == "id-1"


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

    wanted = [(index * 7) % 3 for index in range(30)]
    rows = [
        {"body": {"images": [b64(picture(colour + turn, index)) for turn in range(3)]}}
        if index % 4 == 0
        else {"body": picture(colour, index)}
        for index, colour in enumerate(wanted)
    ]
    replies = ask(classifier, *rows)
    for index, (colour, reply) in enumerate(zip(wanted, replies, strict=True)):
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


def test_the_second_of_two_identical_images_counts_in_the_budget(model_dir: Path) -> None:
    classifier = start(model_dir, max_image_pixels=64 * 48 + 1)
    body = {"images": [b64(encode(plain(RED)))] * 2}
    [reply] = ask(classifier, {"body": body})
    assert [one["status"] for one in reply.body["results"]] == ["success", "error"]
    assert reply.body["results"][1]["type"] == "TooManyPixels"


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


def test_a_cached_image_counts_in_the_budget(model_dir: Path) -> None:
    classifier = start(model_dir, cache_bytes=2**20, max_image_pixels=300 * 200)
    assert ask(classifier, {"body": JPEG})[0].status == 200
    [reply] = ask(classifier, {"body": {"images": [b64(JPEG), b64(JPEG)]}}, headers=JSON)
    assert [one["status"] for one in reply.body["results"]] == ["success", "error"]


# --- Several images in a request


CASES = [
    ("json", [JPEG], 200, "success"),
    ("json", [JPEG, PNG], 200, "success"),
    ("json", [JPEG, b"bad"], 200, "partial"),
    ("json", [b"bad", b"<svg/>"], 415, "error"),
    ("json", [b"bad"], 400, "error"),
    ("parts", [JPEG, PNG], 200, "success"),
    ("parts", [b"bad", PNG], 200, "partial"),
    ("parts", [b"<svg/>", b"bad"], 415, "error"),
]


@pytest.mark.parametrize(("form", "images", "status", "outcome"), CASES, ids=range(len(CASES)))
def test_several_images(
    classifier: ImageClassifier, form: str, images: list[bytes], status: int, outcome: str
) -> None:
    row: dict[str, Any] = {f"file{index}": image for index, image in enumerate(images)}
    if form == "json":
        row = {"body": {"images": [b64(image) for image in images]}}
    [reply] = ask(classifier, row)
    assert (reply.status, reply.body["status"]) == (status, outcome)
    assert list(reply.body) == ["status", "results"]
    bad = {b"bad": "UnreadableImage", b"<svg/>": "UnsupportedFormat"}
    assert [result.get("type") for result in reply.body["results"]] == list(map(bad.get, images))
    for result, image in zip(reply.body["results"], images, strict=True):
        if image not in bad:
            [alone] = ask(classifier, {"body": image})
            ours, theirs = without_times(result), without_times(alone.body)
            assert ours["metadata"] == theirs["metadata"]
            assert [one["class_id"] for one in ours["predictions"]] == [
                one["class_id"] for one in theirs["predictions"]
            ]


def test_empty_images_of_a_list_fail_alone(classifier: ImageClassifier) -> None:
    [reply] = ask(classifier, {"body": {"images": ["", b64(JPEG), 3]}})
    assert [result.get("type") for result in reply.body["results"]] == [
        "NoImage",
        None,
        "MalformedRequest",
    ]


# --- The model fails


@pytest.mark.parametrize("fail", [broken, not_a_number, one_too_few])
def test_a_failing_model_is_a_500_for_the_rows_it_concerns(
    classifier: ImageClassifier, fail: Callable[[Tensor], Tensor]
) -> None:
    classifier.engine = Fake(fail)
    rows: list[dict[str, Any]] = [
        {"body": JPEG},
        {"body": b"bad"},
        {"body": {"images": [b64(JPEG), "%"]}},
    ]
    good, bad, several = ask(classifier, *rows)
    assert (good.status, good.error) == (500, "ModelFailed")
    assert (bad.status, bad.error) == (400, "UnreadableImage")
    assert (several.status, several.body["status"]) == (500, "error")
    assert {reply.content_type for reply in (good, bad, several)} == {"application/json"}


@pytest.mark.parametrize("fail", [broken, not_a_number])
def test_the_cause_is_in_the_log_under_the_request_id(
    classifier: ImageClassifier,
    caplog: pytest.LogCaptureFixture,
    fail: Callable[[Tensor], Tensor],
) -> None:
    classifier.engine = Fake(fail)
    replies = ask(classifier, {"body": JPEG}, {"body": PNG})
    failures = log(caplog, "failure")
    assert {one for line in failures for one in line["requests"]} == {"id-0", "id-1"}
    assert all(line["level"] == "ERROR" and line["model"] == "birds" for line in failures)
    causes = " ".join(line["cause"] for line in failures)
    if fail is broken:
        assert "cuDNN says no at 0x7f00" in causes
        assert "Traceback" in causes
    else:
        assert "no finite probabilities" in causes
    for reply in replies:
        assert not any(word in reply.body["message"] for word in ("0x", "/", "cuDNN", "Traceback"))


def out_of_memory(_: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def illegal_access(_: Tensor) -> Tensor:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


class Lost(Fake):
    """On a GPU whose context is gone after the first error."""

    def is_lost(self) -> bool:
        return True


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit statuses with which the process would have ended, without waiting."""
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    monkeypatch.setattr(handler.image_classifier, "LEAVE_SECONDS", 0.0)
    return statuses


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_out_of_memory_is_a_507_for_the_images_of_that_pass(
    classifier: ImageClassifier, caplog: pytest.LogCaptureFixture, ended: list[int]
) -> None:
    def second(images: Tensor) -> Tensor:
        if len(engine.batches) == 2:
            out_of_memory(images)
        return torch.full((len(images), 3), 1 / 3)

    engine = classifier.engine = Fake(second)
    rows = [{"body": encode(plain(RED, (9, side)))} for side in range(1, 10)]
    replies = ask(classifier, *rows, {"body": b"bad"})
    assert [reply.status for reply in replies] == [200] * 4 + [507] * 4 + [200, 400]
    assert {reply.error for reply in replies[4:8]} == {"OutOfResources"}
    assert "20.00 MiB" not in replies[4].body["message"]
    [line] = log(caplog, "failure")
    assert "Tried to allocate 20.00 MiB" in line["cause"]
    assert line["requests"] == ["id-4", "id-5", "id-6", "id-7"]
    assert not classifier.gpu_lost
    assert ended == []


def test_a_cuda_error_that_passes_is_a_500(
    classifier: ImageClassifier, caplog: pytest.LogCaptureFixture, ended: list[int]
) -> None:
    classifier.engine = Fake(illegal_access)
    assert ask(classifier, {"body": JPEG})[0].status == 500
    assert log(caplog, "gpu_lost") == []
    assert not classifier.gpu_lost


def test_a_lost_gpu_ends_the_worker_when_its_answers_are_out(
    classifier: ImageClassifier, caplog: pytest.LogCaptureFixture, ended: list[int]
) -> None:
    classifier.engine = Lost(illegal_access)
    rows = [{"body": encode(plain(RED, (9, side)))} for side in range(1, 7)]  # two passes
    replies = ask(classifier, *rows, {"body": b"bad"})
    assert [reply.status for reply in replies] == [507] * 6 + [400]
    assert {reply.error for reply in replies[:6]} == {"OutOfResources"}
    [line] = log(caplog, "gpu_lost")
    assert (line["level"], line["model"]) == ("ERROR", "birds")
    assert "an illegal memory access was encountered" in line["cause"]
    wait_for(lambda: ended)
    assert ended == [1]


def test_until_a_worker_with_a_lost_gpu_has_ended_it_answers_at_once(
    classifier: ImageClassifier, monkeypatch: pytest.MonkeyPatch, ended: list[int]
) -> None:
    monkeypatch.setattr(handler.image_classifier, "LEAVE_SECONDS", 3600.0)
    engine = classifier.engine = Lost(illegal_access)
    ask(classifier, {"body": JPEG})
    replies = ask(classifier, {"body": PNG}, {"body": b"bad"})
    assert [(reply.status, reply.error) for reply in replies] == [(507, "OutOfResources")] * 2
    assert engine.batches == [1]
    assert ended == []


def test_what_was_counted_is_handed_over_before_the_end(
    classifier: ImageClassifier, monkeypatch: pytest.MonkeyPatch, ended: list[int]
) -> None:
    emitted: dict[tuple[str, ...], float] = {}

    def emit(name: str, increment: float, labels: Sequence[str]) -> None:
        emitted[(name, *labels)] = increment

    classifier.metrics = Metrics(emit, "birds", "1.0")
    classifier.engine = Lost(illegal_access)
    monkeypatch.setattr(handler.image_classifier, "LEAVE_SECONDS", 0.2)
    ask(classifier, {"body": JPEG})
    wait_for(lambda: ended)
    assert emitted["classifier_requests_total", "birds", "1.0", "507"] == 1


# --- Several threads


def test_a_worker_with_several_threads_gives_the_same_answers(model_dir: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"body": JPEG},
        {"body": b"bad"},
        {"body": {"images": [b64(PNG), b64(JPEG[:-900])]}},
    ]
    one, many = start(model_dir), start(model_dir, threads=3)
    for ours, theirs in zip(ask(many, *rows), ask(one, *rows), strict=True):
        assert (ours.status, ours.body["status"]) == (theirs.status, theirs.body["status"])
        for first, second in zip(
            ours.body.get("results", [ours.body]),
            theirs.body.get("results", [theirs.body]),
            strict=True,
        ):
            if first["status"] == "error":
                assert first == second
                continue
            assert without_times(first)["metadata"] == without_times(second)["metadata"]
            for best, other in zip(first["predictions"], second["predictions"], strict=True):
                assert best["confidence"] == pytest.approx(other["confidence"], abs=1e-5)


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
        def launch(self, images: Sequence[Tensor]) -> Callable[[], Tensor]:
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


def test_only_the_pass_that_failed_is_lost(classifier: ImageClassifier) -> None:
    def second(images: Tensor) -> Tensor:
        if len(engine.batches) == 2:
            raise RuntimeError("out of memory")
        return torch.full((len(images), 3), 1 / 3)

    engine = classifier.engine = Fake(second)
    replies = ask(classifier, *[{"body": encode(plain(RED, (9, side)))} for side in range(1, 7)])
    assert [reply.status for reply in replies] == [200] * 4 + [500] * 2


def test_the_next_batch_is_answered_again(classifier: ImageClassifier) -> None:
    engine, classifier.engine = classifier.engine, Fake(broken)
    assert ask(classifier, {"body": JPEG})[0].status == 500
    classifier.engine = engine
    assert ask(classifier, {"body": JPEG})[0].status == 200


@pytest.mark.parametrize(
    ("module", "function"),
    [(handler.image_classifier, "open_image"), (handler.decoders, "decode_picture")],
)
def test_a_bug_of_ours_is_one_clients_500(
    classifier: ImageClassifier,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    function: str,
) -> None:
    original = getattr(module, function)

    def fragile(image: Any, *args: Any) -> Any:
        data = image if isinstance(image, bytes) else image.data
        return original(image, *args) if data == JPEG else 1 // 0

    monkeypatch.setattr(module, function, fragile)
    bad, good = ask(classifier, {"body": PNG}, {"body": JPEG})
    assert (bad.status, bad.error, good.status) == (500, "ModelFailed", 200)
    [line] = log(caplog, "failure")
    assert line["requests"] == ["id-0"]
    assert "ZeroDivisionError" in line["cause"]


@pytest.mark.parametrize("filename", ["\ud800", "a\udfffb"])
def test_no_text_of_a_client_costs_the_batch(classifier: ImageClassifier, filename: str) -> None:
    """TorchServe parses JSON with Python's json, which lets half of a surrogate pair pass."""
    body = {"image": b64(JPEG), "filename": filename}
    odd, good = ask(classifier, {"body": body}, {"body": JPEG})
    assert (odd.status, good.status) == (400, 200)


# --- Describe and explain


def test_describe(classifier: ImageClassifier) -> None:
    [reply] = ask(classifier, {}, headers={"describe": "True"})
    facts = reply.body
    assert {
        name: facts[name]
        for name in ("model", "version", "architecture", "classes", "input_size", "recipe")
    } == {
        "model": "birds",
        "version": "1.0",
        "architecture": "squeezenet1_1",
        "classes": 3,
        "input_size": [3, 224, 224],
        "recipe": "SqueezeNet1_1_Weights.IMAGENET1K_V1",
    }
    assert facts["parameters"] == {"total": 724_035, "trainable": 724_035}
    assert facts["transforms"] == {
        "resize_size": 256,
        "crop_size": 224,
        "interpolation": "bilinear",
        "antialias": True,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert facts["weights"] == {
        "name": "birds.pth",
        "trained": True,
        "source": "file",
        "sha256": "0" * 64,
    }
    assert (facts["engine"], facts["precision"], facts["device"]) == ("torch-fp32", "fp32", "cpu")
    assert facts["decoder"] == "cpu"
    assert facts["libraries"]["torch"] == torch.__version__.partition("+")[0]
    assert facts["settings"]["threads"] == facts["threads"] == 1
    assert facts["settings"]["top_k"] == 5


def test_a_clients_describe_header_is_no_describe(classifier: ImageClassifier) -> None:
    """TorchServe's base handler would answer it for the whole batch."""
    header = {"describe": "True"}
    [reply] = ask(classifier, {"body": JPEG}, headers=header)
    assert reply.body["status"] == "success"
    replies = ask(classifier, {}, {"body": JPEG}, headers=[header, header])
    assert [reply.status for reply in replies] == [400, 200]


@pytest.mark.parametrize("name", ["explain", "Explain"])
def test_explanations_are_refused(classifier: ImageClassifier, name: str) -> None:
    [reply] = ask(classifier, {"body": JPEG}, headers={name: "True"})
    assert (reply.status, reply.error) == (400, "MalformedRequest")
    assert "/predictions" in reply.body["message"]


def test_torchserves_explain_header_of_predictions(classifier: ImageClassifier) -> None:
    [reply] = ask(classifier, {"body": JPEG}, headers={"explain": "False"})
    assert reply.status == 200


# --- Log


def test_a_line_for_each_request(
    classifier: ImageClassifier, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = ask(classifier, {"body": {"images": [b64(JPEG), b64(PNG)]}}, {"body": b"bad"})
    first, second = log(caplog, "request")
    best = good.body["results"][0]["predictions"][0]
    assert list(first) == list(second) == REQUEST_KEYS
    assert {name: first[name] for name in first if not name.endswith(("_ms", "time"))} == {
        "level": "INFO",
        "event": "request",
        "request_id": "id-0",
        "traceparent": None,
        "model": "birds",
        "version": "1.0",
        "weights": "birds.pth",
        "status": 200,
        "images": 2,
        "cached": 0,
        "batch": 2,
        "top_class": best["class"],
        "confidence": best["confidence"],
        "error": None,
    }
    assert (second["request_id"], second["status"], second["images"]) == ("id-1", bad.status, 1)
    assert (second["top_class"], second["confidence"]) == (None, None)
    assert (second["level"], second["error"]) == ("INFO", "UnreadableImage")
    for line in (first, second):
        assert line.pop("queue_ms") is None
        assert all(line[name] >= 0 for name in line if name.endswith("_ms"))
        assert line["total_ms"] >= line["inference_ms"]


def test_a_500_is_an_error_in_the_log(
    classifier: ImageClassifier, caplog: pytest.LogCaptureFixture
) -> None:
    classifier.engine = Fake(broken)
    ask(classifier, {"body": JPEG})
    [line] = log(caplog, "request")
    assert (line["level"], line["status"], line["error"]) == ("ERROR", 500, "ModelFailed")


def test_lines_are_ascii(model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """TorchServe's reader would break a line at U+2028."""
    for path in model_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    card = json.loads((tmp_path / CARD_FILE).read_text()) | {"labels": ["鷺\u2028"] * 3}
    (tmp_path / CARD_FILE).write_text(json.dumps(card))
    ask(start(tmp_path), {"body": JPEG})
    [line] = log(caplog, "request")
    assert line["top_class"] == "鷺\u2028"
    assert all(record.getMessage().isascii() for record in caplog.records)


@pytest.mark.parametrize("fail", [None, broken])
def test_no_image_is_ever_in_the_log(
    classifier: ImageClassifier,
    caplog: pytest.LogCaptureFixture,
    fail: Callable[[Tensor], Tensor] | None,
) -> None:
    classifier.engine = Fake(fail)
    secret = b"\x01\x02secret-of-a-client" * 20
    cut = JPEG[:-50] + secret
    rows: list[dict[str, Any]] = [{name: JPEG + secret} for name in ("body", "file", "image")]
    rows += [{"body": {"image": b64(JPEG + secret)}}, {"body": {"image": b64(secret) + "%"}}]
    rows += [{"body": cut}, {"body": secret}, {"body": b"{" + secret}, {"odd": secret}]
    rows += [{"file": JPEG, "filename": secret[:200]}, {"file": JPEG, "top_k": secret}]
    ask(classifier, *rows)
    assert len(log(caplog, "request")) == len(rows)
    for hidden in ("secret-of-a-client", b64(secret)[8:40], b64(JPEG)[:40], "JFIF"):
        assert hidden not in caplog.text


def test_a_trace_is_carried_through(
    classifier: ImageClassifier, caplog: pytest.LogCaptureFixture
) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    for value in (trace, "Bearer secret-key"):
        ask(classifier, {"body": JPEG}, headers={"Traceparent": value, "Authorization": value})
    assert [line["traceparent"] for line in log(caplog, "request")] == [trace, None]
    assert "secret-key" not in caplog.text


@pytest.mark.parametrize(
    ("level", "lines"), [("info", [200, 500]), ("warning", [500]), ("error", [500])]
)
def test_lines_below_the_level_are_not_written(
    model_dir: Path, caplog: pytest.LogCaptureFixture, level: str, lines: list[int]
) -> None:
    classifier = start(model_dir, log_level=level)
    for fail in (None, broken):
        classifier.engine = Fake(fail)
        ask(classifier, {"body": JPEG})
    assert [line["status"] for line in log(caplog, "request")] == lines
    assert len(log(caplog, "model_ready")) == (level == "info")


def test_request_lines_can_be_turned_off(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    classifier = start(model_dir, log_requests=False)
    classifier.engine = Fake(broken)
    ask(classifier, {"body": JPEG})
    assert log(caplog, "request") == []
    assert len(log(caplog, "failure")) == 1


def test_torchserves_own_chatter_stops(
    classifier: ImageClassifier, caplog: pytest.LogCaptureFixture
) -> None:
    """Each batch would be a line; errors and metrics pass."""
    logging.info("Backend received inference at: 1")
    logging.error("Prediction error")
    logging.getLogger("ts.metrics.caching_metric").info("[METRICS]x")
    assert "Backend received" not in caplog.text
    assert "Prediction error" in caplog.text
    assert "[METRICS]x" in caplog.text
    assert classifier.initialized


# --- Metrics


class Counted(dict[tuple[str, ...], float]):
    """What a classifier counts from now on, without what stays at 0."""

    def __init__(self, classifier: ImageClassifier) -> None:
        def emit(name: str, increment: float, labels: Sequence[str]) -> None:
            if increment:
                self[(name.removeprefix("classifier_"), *labels[2:])] = increment

        self._metrics = classifier.metrics = Metrics(emit, "birds", "1.0")

    def read(self, name: str) -> dict[str, float]:
        """Values of the series of a name by their last label."""
        self._metrics.flush()
        return {key[-1]: value for key, value in self.items() if key[0] == name}


def test_requests_images_and_stages_are_counted(classifier: ImageClassifier) -> None:
    counted = Counted(classifier)
    rows: list[dict[str, Any]] = [
        {"body": {"images": [b64(JPEG), "%"]}},
        {"body": b"bad"},
        {"body": PNG},
        {},
    ]
    ask(classifier, *rows)
    assert counted.read("requests_total") == {"200": 2, "400": 2}
    images = {"success": 2, "InvalidBase64": 1, "UnreadableImage": 1, "NoImage": 1}
    assert counted.read("images_total") == images
    stages = {"preprocess": 4, "inference": 2, "postprocess": 4, "total": 4, "response": 4}
    assert counted.read("stage_seconds_count") == stages
    assert counted.read("batch_requests_sum") == {"batch_requests_sum": 4}
    assert counted["batch_requests_count",] == 1
    assert counted["worker_busy_seconds_total", "0"] > 0


def test_images_are_measured(classifier: ImageClassifier) -> None:
    classifier.engine = Fake()
    counted = Counted(classifier)
    red = encode(plain(RED, (400, 100)), "PNG")
    ask(classifier, {"file1": red, "file2": red, "file3": b"bad"}, {"body": {"image": "%"}})
    counted.read("")
    assert counted["image_bytes_sum",] == 2 * len(red) + 3
    assert counted["image_pixels_sum",] == 2 * 400 * 100
    assert counted["top_confidence_ratio_count",] == 2
    assert counted["top_class_total", "0", LABELS[0]] == 2
    assert counted.read("cache_lookups_total") == {}


def test_cache_lookups_are_counted(model_dir: Path) -> None:
    classifier = start(model_dir, cache_bytes=10**6)
    counted = Counted(classifier)
    for body in (JPEG, JPEG, PNG, b"bad"):
        ask(classifier, {"body": body})
    assert counted.read("cache_lookups_total") == {"miss": 2, "hit": 1}


def test_time_before_the_worker_is_the_stage_queue(
    classifier: ImageClassifier, caplog: pytest.LogCaptureFixture
) -> None:
    counted = Counted(classifier)
    ask(classifier, {"body": JPEG}, headers={"X-Request-Start": f"t={time.time() - 2:.3f}"})
    assert counted.read("stage_seconds_count")["queue"] == 1
    assert 1.9 < counted["stage_seconds_sum", "queue"] < 60
    waited = counted["stage_seconds_sum", "queue"] + counted["stage_seconds_sum", "total"]
    assert counted["stage_seconds_sum", "response"] == pytest.approx(waited)
    [line] = log(caplog, "request")
    assert line["queue_ms"] == pytest.approx(counted["stage_seconds_sum", "queue"] * 1000, abs=0.01)


def test_gauges_say_what_is_served(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, tuple[float, tuple[str, ...]]] = {}

    def emit(name: str, value: float, labels: Sequence[str]) -> None:
        seen[name] = value, tuple(labels)

    monkeypatch.setattr(handler.image_classifier, "torchserve_emit", lambda: emit)
    start(model_dir, warmup_batches=1)
    value, labels = seen["classifier_model_info"]
    assert (value, labels[:2]) == (1, ("birds", "1.0"))
    assert labels[3:] == ("birds.pth", "true", "torch-fp32", "fp32", "cpu")
    value, labels = seen["classifier_build_info"]
    assert (value, labels[3]) == (1, "0.12.0")
    assert seen["classifier_worker_warmup_seconds"][0] > 0
    assert seen["classifier_worker_warmup_seconds"] < seen["classifier_worker_startup_seconds"]
    assert seen["classifier_worker_starts_total"][0] == 1


def test_a_start_that_fails_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, float] = {}
    emit = lambda name, value, _: seen.update({name: value})  # noqa: E731
    monkeypatch.setattr(handler.image_classifier, "torchserve_emit", lambda: emit)
    with pytest.raises(RuntimeError):
        start(tmp_path)
    assert seen["classifier_worker_starts_total"] == 1


def test_metrics_are_flushed_from_the_start(
    classifier: ImageClassifier, isolation: list[Metrics]
) -> None:
    assert isolation == [classifier.metrics]


# --- Starting


def test_ready_line(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    start(model_dir)
    [line] = log(caplog, "model_ready")
    assert line["startup_ms"] > 0
    assert {name: line[name] for name in line if name not in ("time", "startup_ms")} == {
        "level": "INFO",
        "event": "model_ready",
        "model": "birds",
        "version": "1.0",
        "weights": "birds.pth",
        "engine": "torch-fp32",
        "device": "cpu",
        "threads": 1,
    }


def test_untrained_weights_are_said_everywhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classifier = start(make_model_dir(tmp_path, trained=False))
    [reply] = ask(classifier, {"body": JPEG})
    [info] = ask(classifier, {}, headers={"describe": "True"})
    assert reply.body["metadata"]["weights"] == "untrained"
    assert (info.body["weights"]["name"], info.body["weights"]["trained"]) == ("untrained", False)
    [ready] = log(caplog, "model_ready")
    assert (ready["level"], ready["weights"]) == ("WARNING", "untrained")


def test_untrained_weights_can_be_forbidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CLASSIFIER_ALLOW_UNTRAINED", "false")
    folder = make_model_dir(tmp_path, trained=False)
    with pytest.raises(RuntimeError, match="untrained, and allow_untrained is false"):
        start(folder)
    [line] = log(caplog, "startup_failed")
    assert (line["level"], line["model"]) == ("ERROR", "birds")
    assert line["message"] == "the weights are untrained, and allow_untrained is false"


def test_trained_weights_start_in_production(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLASSIFIER_ENV", "production")
    assert start(model_dir).initialized


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk": 3}, "handler.topk is unknown"),
        ({"top_k": 0}, "top_k must be 1 to 1000, got 0"),
        ({"precision": "int8"}, "which only the engine openvino has"),
    ],
)
def test_wrong_settings_stop_the_start(
    model_dir: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        start(model_dir, **settings)
    [line] = log(caplog, "startup_failed")
    assert message in line["message"]


def test_a_folder_without_a_model_stops_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RuntimeError, match=r"no model\.json"):
        start(tmp_path)
    assert len(log(caplog, "startup_failed")) == 1


def test_a_model_that_cannot_run_stops_the_start(
    model_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the worker says READY, not at the first request."""
    monkeypatch.setattr(handler.image_classifier, "load_engine", lambda *_, **__: Fake(broken))
    with pytest.raises(RuntimeError, match="cuDNN says no"):
        start(model_dir, warmup_batches=1)
    [line] = log(caplog, "startup_failed")
    assert "Traceback" in line["cause"]


@pytest.mark.parametrize(
    ("config", "warmup_batches", "batches"),
    [
        ({"batchSize": 3}, 2, [1, 3, 1, 3]),
        ({"batchSize": 1}, 1, [1]),
        ({}, 1, [1]),
        ({"batchSize": 1000}, 1, [1, 4]),
        ({"batchSize": 8}, 0, []),
    ],
)
def test_warm_up_runs_one_image_and_a_full_batch(
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    warmup_batches: int,
    batches: list[int],
) -> None:
    engine = Fake()
    monkeypatch.setattr(handler.image_classifier, "load_engine", lambda *_, **__: engine)
    start(model_dir, config, warmup_batches=warmup_batches)
    assert engine.batches == batches


@pytest.mark.parametrize("limit", ["max_image_bytes", "max_image_pixels"])
def test_warm_up_minds_no_limits(model_dir: Path, limit: str) -> None:
    """They are for clients; ours is no client."""
    tight: dict[str, Any] = {limit: 1}
    assert start(model_dir, warmup_batches=1, **tight).initialized


def test_a_model_without_configuration_starts(model_dir: Path) -> None:
    """An archive in somebody else's TorchServe may have none."""
    classifier = ImageClassifier()
    context = make_context(model_dir)
    context.model_yaml_config = None
    classifier.initialize(context)
    [reply] = ask(classifier, {"body": JPEG})
    assert reply.status == 200
