"""What the log and the metrics say about requests."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from ts.metrics.caching_metric import CachingMetric

import handler.image_classifier
from handler.accounting import COMPUTING
from handler.golden import GOLDEN_FILE
from handler.image_classifier import ImageClassifier
from handler.model_card import CARD_FILE
from tests.drawing import RED, encode, plain
from tests.unit.handler.worker import (
    JPEG,
    PNG,
    Counted,
    Fake,
    ask,
    b64,
    broken,
    log,
    start,
)
from tests.unit.tiny import ARCHITECTURE, LABELS

pytestmark = pytest.mark.usefixtures("isolation")
REQUEST_KEYS = [
    *("time", "level", "event", "request_id", "traceparent", "model", "version", "weights"),
    *("archive", "engine", "decoder", "decode", "libraries", "status", "images", "image_bytes"),
    *("image_sha256", "cached", "batch", "queue_ms", "preprocess_ms", "inference_ms"),
    *("postprocess_ms", "total_ms", "top_class", "confidence", "error"),
]


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
        "archive": "1" * 12,
        "engine": classifier.engine.name,
        "decoder": "cpu",
        "decode": "exact",
        "libraries": {name: version(name) for name in COMPUTING},
        "status": 200,
        "images": 2,
        "image_bytes": len(JPEG) + len(PNG),
        "image_sha256": None,  # the only one of a request's, and without a cache nobody knows it
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


def test_lines_are_ascii(model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """TorchServe's reader would break a line at U+2028."""
    for path in model_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / GOLDEN_FILE).unlink()  # its labels are others
    card = json.loads((tmp_path / CARD_FILE).read_text())
    card |= {"labels": ["鷺\u2028"] * 3, "files": {}}
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
    assert classifier.initialized
    caplog.clear()
    logging.info("Backend received inference at: 1")
    logging.error("Prediction error")
    CachingMetric("classifier_requests_total", "Count").add_or_update(1)
    error, metric = caplog.messages
    assert error == "Prediction error"
    assert metric.startswith("[METRICS]classifier_requests_total.")


# --- Metrics


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


@pytest.fixture
def emitted(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """Value and labels of what a start emits."""
    seen: dict[str, tuple[Any, ...]] = {}

    def emit(name: str, value: float, labels: Sequence[str]) -> None:
        seen[name] = value, *labels

    monkeypatch.setattr(handler.image_classifier, "torchserve_emit", lambda: emit)
    return seen


def test_gauges_say_what_is_served(model_dir: Path, emitted: dict[str, tuple[Any, ...]]) -> None:
    start(model_dir, warmup_batches=1)
    model = (1, "birds", "1.0", ARCHITECTURE, "birds.pth", "true", "torch-fp32", "fp32", "cpu")
    assert emitted["classifier_model_info"] == model
    assert emitted["classifier_build_info"][:5] == (1, "birds", "1.0", "1" * 12, "0.12.0")
    warm_up = emitted["classifier_worker_warmup_seconds"][0]
    assert 0 < warm_up < emitted["classifier_worker_startup_seconds"][0]
    assert emitted["classifier_worker_starts_total"][0] == 1


def test_a_start_that_fails_is_counted(tmp_path: Path, emitted: dict[str, tuple[Any, ...]]) -> None:
    with pytest.raises(RuntimeError):
        start(tmp_path)
    assert emitted["classifier_worker_starts_total"][0] == 1
    assert emitted["classifier_worker_startup_seconds"][0] == 0


def test_metrics_are_flushed_from_the_start(
    classifier: ImageClassifier, isolation: list[object]
) -> None:
    """Started last, the accounts are settled first when the process ends."""
    assert isolation == [classifier.metrics, classifier.accounts]
