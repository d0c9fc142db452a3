"""The real handler with TorchServe's own context objects."""

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.service import Service
from ts.utils.util import list_classes_from_module

import handler.image_classifier
from handler.engine import Sameness
from handler.golden import GOLDEN_FILE
from handler.image_classifier import ImageClassifier
from handler.model_card import WEIGHTS_FILE
from tests.drawing import noise
from tests.unit.handler.worker import (
    JPEG,
    MULTIPART,
    PNG,
    Fake,
    ask,
    broken,
    log,
    make_context,
    start,
)
from tests.unit.tiny import ARCHITECTURE, LABELS, RECIPE, make_model_dir

pytestmark = pytest.mark.usefixtures("isolation")
METRICS_CONFIG = Path(handler.__file__).parent / "configs" / "metrics.yaml"


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
    top_k = {"name": b"X-Top-K", "value": b"1"}
    multipart = {"name": b"Content-Type", "value": b"multipart/form-data"}
    image = {"name": "body", "contentType": "image/jpeg", "value": bytearray(JPEG)}
    file = {"name": "file", "contentType": "image/png", "value": bytearray(PNG)}
    option = {"name": "top_k", "contentType": "text/plain", "value": "9"}
    reply = service.predict(
        [
            {"requestId": b"id-0", "headers": [top_k], "parameters": [image]},
            {"requestId": b"id-1", "headers": [multipart], "parameters": [file, option]},
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


def test_best_classes_are_in_a_header_if_the_gateway_asks(classifier: ImageClassifier) -> None:
    rows: list[dict[str, Any]] = [{"body": JPEG}, {"body": JPEG}, {"body": JPEG}, {"body": b"x"}]
    asked = [{"X-Best-Classes": value} for value in ("1", "2")] + [{}, {"X-Best-Classes": "1"}]
    replies = ask(classifier, *rows, headers=asked)
    best = replies[0].body["predictions"][0]["class_id"]
    headers = [reply.headers.get("X-Best-Classes") for reply in replies]
    assert headers == [str(best), None, None, "-"]


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
        "decode": "exact",
        "cached": False,
        "calibrated": False,
        "request_id": "id-0",
    }


def test_answer_is_the_models(classifier: ImageClassifier) -> None:
    [reply] = ask(classifier, {"body": PNG}, headers={"X-Top-K": "3"})
    image = noise((200, 300), seed=1)
    with torch.inference_mode():
        engine: Any = classifier.engine
        network = engine._model.network
        expected = network(RECIPE.transforms()(image)[None]).softmax(dim=1)[0].tolist()
    for prediction in reply.body["predictions"]:
        assert prediction["confidence"] == pytest.approx(expected[prediction["class_id"]], abs=1e-5)


def test_header_in_any_case(classifier: ImageClassifier) -> None:
    [reply] = ask(classifier, {"body": JPEG}, headers={"x-TOP-k": "1"})
    assert len(reply.body["predictions"]) == 1


# --- Describe and explain


def test_describe(classifier: ImageClassifier) -> None:
    [reply] = ask(classifier, {}, headers={"describe": "True"})
    facts = reply.body
    assert (facts["model"], facts["version"], facts["classes"]) == ("birds", "1.0", 3)
    assert (facts["architecture"], facts["recipe"]) == (ARCHITECTURE, str(RECIPE))
    assert facts["input_size"] == [3, 224, 224]
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
    assert facts["gpu_samplings"] == []
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
def test_a_network_that_ends_otherwise_is_not_explained(
    classifier: ImageClassifier, name: str
) -> None:
    [reply] = ask(classifier, {"body": JPEG}, headers={name: "True"})
    assert (reply.status, reply.error) == (400, "MalformedRequest")
    assert f"{ARCHITECTURE} cannot be explained" in reply.body["message"]


def test_torchserves_explain_header_of_predictions(classifier: ImageClassifier) -> None:
    [reply] = ask(classifier, {"body": JPEG}, headers={"explain": "False"})
    assert reply.status == 200


# --- Starting


def test_ready_line(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    start(model_dir)
    [line] = log(caplog, "model_ready")
    assert line["startup_ms"] > line["certificate_ms"] > 0
    assert {name: line[name] for name in line if name != "time" and not name.endswith("_ms")} == {
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


@pytest.mark.parametrize("name", [WEIGHTS_FILE, GOLDEN_FILE])
def test_a_changed_file_stops_the_start_before_it_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """It would not be read as tensors: that is not what the worker complains about."""
    (make_model_dir(tmp_path) / name).write_bytes(b"something else")
    with pytest.raises(RuntimeError, match="is not as it was packaged: its sha256 is "):
        start(tmp_path)
    [line] = log(caplog, "startup_failed")
    assert line["message"].startswith(f"{name} of the archive ")
    assert "cause" not in line or line["cause"] is None


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


def test_a_model_that_cannot_run_stops_the_start(
    model_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the worker says READY, not at the first request."""
    monkeypatch.setattr(handler.image_classifier, "load_engine", lambda *_, **__: Fake(broken))
    with pytest.raises(RuntimeError, match="cuDNN says no"):
        start(model_dir, warmup_batches=1)
    [line] = log(caplog, "startup_failed")
    assert "Traceback" in line["cause"]


def test_info_has_the_certificate(model_dir: Path) -> None:
    [info] = ask(start(model_dir), {}, headers={"describe": "True"})
    certificate = info.body["certificate"]
    assert 0 <= certificate.pop("logits_error") < 1e-4
    assert 0 <= certificate.pop("decode_difference") < 0.01
    assert 0 < certificate.pop("seconds") < 60
    assert certificate == {
        "images": 8,
        "class_agreement": 1,
        "engine": "torch-fp32",
        "precision": "fp32",
        "decoder": "cpu",
        "decode": "exact",
    }


def test_an_engine_that_is_far_off_is_said_and_may_be_kept(
    model_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Fake()
    engine.sameness = Sameness(0.25, agreement=0.5, loss=0.1)
    engine.refused = {"cuda-fp16": Sameness(float("nan"), agreement=0, loss=0)}
    monkeypatch.setattr(handler.image_classifier, "load_engine", lambda *_, **__: engine)
    start(model_dir)
    [line] = log(caplog, "engine_chosen")
    assert line["level"] == "WARNING"
    assert line["engine"] == engine.name
    assert line["golden_errors"] == {"cuda-fp16": None, engine.name: 0.25}


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
