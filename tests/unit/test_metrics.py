"""Counters and histograms: cumulative, complete, handed over once, and declared to TorchServe."""

import logging
import re
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import handler
from handler import metrics as metrics_module
from handler.gpus import GAUGES, MEMORY_USED, UTILIZATION
from handler.metrics import COUNTERS, IMAGES, REQUESTS, STAGE, STAGE_BUCKETS, Metrics
from handler.metrics import torchserve_emit as emit_to_torchserve

CONFIG = Path(handler.__file__).parent / "configs" / "metrics.yaml"
MODEL = ("birds", "1.0")

# org.pytorch.serve.metrics.Metric reads lines of this form, and values of this form alone.
LINE = re.compile(
    r"\[METRICS\](?P<name>\w+)\.(?P<unit>\w+):(?P<value>[0-9\-,.e]+)\|#(?P<labels>[^|]*)\|"
    r"#type:(?P<type>\w+)\|#hostname:[^,]+,\d+"
)


class Recorder:
    """Everything emitted, in order, and its sum."""

    def __init__(self) -> None:
        self.emitted: list[tuple[str, tuple[str, ...], float]] = []

    def __call__(self, name: str, increment: float, labels: Sequence[str]) -> None:
        self.emitted.append((name, tuple(labels), increment))

    def total(self, name: str, *labels: str) -> float:
        wanted = (name, (*MODEL, *labels))
        return sum(value for name, labels, value in self.emitted if (name, labels) == wanted)


def recorded() -> tuple[Metrics, Recorder]:
    recorder = Recorder()
    return Metrics(recorder, *MODEL), recorder


def buckets(recorder: Recorder, stage: str) -> list[float]:
    bounds = [f"{bound:g}" for bound in STAGE_BUCKETS] + ["+Inf"]
    return [recorder.total(f"{STAGE}_bucket", stage, bound) for bound in bounds]


def test_series_exist_before_the_first_request() -> None:
    metrics, recorder = recorded()
    metrics.flush()
    assert recorder.emitted == [
        (REQUESTS, (*MODEL, "200"), 0),
        (IMAGES, (*MODEL, "success"), 0),
    ]


def test_requests_are_counted_by_status() -> None:
    metrics, recorder = recorded()
    for status in (200, 400, 200, 500):
        metrics.count_request(status)
    metrics.flush()
    assert [recorder.total(REQUESTS, status) for status in ("200", "400", "500")] == [2, 1, 1]


def test_images_are_counted_by_outcome() -> None:
    metrics, recorder = recorded()
    for outcome in ("success", "UnreadableImage", "success"):
        metrics.count_image(outcome)
    metrics.flush()
    assert recorder.total(IMAGES, "success") == 2
    assert recorder.total(IMAGES, "UnreadableImage") == 1


def test_bucket_bounds_rise() -> None:
    assert list(STAGE_BUCKETS) == sorted(set(STAGE_BUCKETS))


@pytest.mark.parametrize("index", range(len(STAGE_BUCKETS)))
def test_a_bound_belongs_to_its_bucket(index: int) -> None:
    """Prometheus: le is "less or equal"."""
    metrics, recorder = recorded()
    metrics.observe("total", STAGE_BUCKETS[index])
    metrics.flush()
    assert buckets(recorder, "total") == [0] * index + [1] * (len(STAGE_BUCKETS) - index + 1)


def test_buckets_are_cumulative() -> None:
    metrics, recorder = recorded()
    durations = [0.0005, 0.003, 0.003, 0.2, 7.0, 60.0]
    for seconds in durations:
        metrics.observe("inference", seconds)
    metrics.flush()
    counts = buckets(recorder, "inference")
    bounds = [*STAGE_BUCKETS, float("inf")]
    assert counts == [sum(seconds <= bound for seconds in durations) for bound in bounds]
    assert counts == sorted(counts)


def test_the_last_bucket_is_the_count() -> None:
    metrics, recorder = recorded()
    for seconds in (0.1, 100.0):
        metrics.observe("total", seconds)
    metrics.flush()
    assert recorder.total(f"{STAGE}_bucket", "total", "+Inf") == 2
    assert recorder.total(f"{STAGE}_count", "total") == 2
    assert recorder.total(f"{STAGE}_sum", "total") == pytest.approx(100.1)


def test_every_bucket_exists_from_the_first_observation() -> None:
    """histogram_quantile() needs them all, those at 0 too."""
    metrics, recorder = recorded()
    metrics.observe("total", 60.0)
    metrics.flush()
    seen = {labels[-1] for name, labels, _ in recorder.emitted if name == f"{STAGE}_bucket"}
    assert seen == {f"{bound:g}" for bound in STAGE_BUCKETS} | {"+Inf"}


def test_stages_are_apart() -> None:
    metrics, recorder = recorded()
    metrics.observe("preprocess", 0.1)
    metrics.observe("inference", 0.2)
    metrics.flush()
    assert recorder.total(f"{STAGE}_sum", "preprocess") == pytest.approx(0.1)
    assert recorder.total(f"{STAGE}_sum", "inference") == pytest.approx(0.2)


def test_nothing_is_emitted_before_a_flush() -> None:
    metrics, recorder = recorded()
    metrics.count_request(200)
    assert recorder.emitted == []


def test_nothing_is_emitted_twice() -> None:
    metrics, recorder = recorded()
    metrics.count_request(200)
    metrics.observe("total", 0.1)
    metrics.flush()
    once = list(recorder.emitted)
    metrics.flush()
    assert recorder.emitted == once
    metrics.count_request(200)
    metrics.flush()
    assert recorder.total(REQUESTS, "200") == 2


def test_a_series_is_emitted_once_in_a_flush() -> None:
    metrics, recorder = recorded()
    for _ in range(10):
        metrics.count_request(200)
        metrics.observe("total", 0.1)
    metrics.flush()
    series = Counter((name, labels) for name, labels, _ in recorder.emitted)
    assert set(series.values()) == {1}


def test_nothing_is_lost_between_threads() -> None:
    metrics, recorder = recorded()
    done = threading.Event()

    def count() -> None:
        for _ in range(500):
            metrics.count_request(200)
            metrics.observe("total", 0.1)

    def flush() -> None:
        while not done.is_set():
            metrics.flush()

    flusher = threading.Thread(target=flush)
    counters = [threading.Thread(target=count) for _ in range(4)]
    for thread in (flusher, *counters):
        thread.start()
    for thread in counters:
        thread.join()
    done.set()
    flusher.join()
    metrics.flush()
    assert recorder.total(REQUESTS, "200") == 2000
    assert recorder.total(f"{STAGE}_count", "total") == 2000
    assert recorder.total(f"{STAGE}_sum", "total") == pytest.approx(200)


def test_a_started_thread_flushes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "FLUSH_SECONDS", 0.01)
    counted = threading.Event()

    def emit(name: str, increment: float, labels: Sequence[str]) -> None:
        if labels[-1] == "418":
            counted.set()

    metrics = Metrics(emit, *MODEL)
    metrics.start()
    metrics.count_request(418)
    assert counted.wait(10)


def test_a_started_thread_reads_gauges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "FLUSH_SECONDS", 0.01)
    seen = threading.Event()

    def emit(name: str, value: float, labels: Sequence[str]) -> None:
        if (name, value, labels) == (MEMORY_USED, 7, ("0",)):
            seen.set()

    Metrics(emit, *MODEL).start(lambda: [(MEMORY_USED, 7, ("0",))])
    assert seen.wait(10)


# --- On the way to TorchServe


def declared(kind: str) -> dict[str, dict[str, Any]]:
    metrics = yaml.safe_load(CONFIG.read_text("utf-8"))["model_metrics"][kind]
    return {metric["name"]: metric for metric in metrics}


def test_the_frontend_knows_every_counter() -> None:
    """What metrics.yaml does not declare is dropped, and other labels lose the sample."""
    assert {
        name: (metric["unit"], tuple(metric["dimensions"]))
        for name, metric in declared("counter").items()
    } == COUNTERS


def test_the_frontend_knows_every_gauge() -> None:
    assert {
        name: (metric["unit"], tuple(metric["dimensions"]))
        for name, metric in declared("gauge").items()
    } == GAUGES


def test_counters_and_gauges_are_all_there_is() -> None:
    kinds = set(yaml.safe_load(CONFIG.read_text("utf-8"))["model_metrics"])
    assert kinds == {"counter", "gauge"}


def test_everything_emitted_is_a_counter_with_its_labels() -> None:
    metrics, recorder = recorded()
    metrics.count_request(400)
    metrics.count_image("NoImage")
    metrics.observe("total", 0.1)
    metrics.flush()
    assert {name for name, *_ in recorder.emitted} == set(COUNTERS)
    for name, labels, increment in recorder.emitted:
        assert len(labels) == len(COUNTERS[name][1])
        assert increment >= 0


def test_lines_are_what_torchserve_reads(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ts.metrics")
    metrics = Metrics(emit_to_torchserve(), *MODEL)
    metrics.count_request(200)
    metrics.observe("total", 1.5e-7)
    metrics.flush()
    lines = [LINE.fullmatch(message) for message in caplog.messages]
    assert all(lines), caplog.messages
    assert {line["type"] for line in lines if line} == {"COUNTER"}
    seen = {(line["name"], line["labels"]): line["value"] for line in lines if line}
    assert seen[REQUESTS, "model:birds,version:1.0,status:200"] == "1"
    assert seen[f"{STAGE}_bucket", "model:birds,version:1.0,stage:total,le:+Inf"] == "1"
    assert float(seen[f"{STAGE}_sum", "model:birds,version:1.0,stage:total"]) == 1.5e-7
    assert {line["name"] for line in lines if line} == set(COUNTERS)


def test_gauges_are_what_torchserve_reads(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ts.metrics")
    emit = emit_to_torchserve()
    emit(MEMORY_USED, 85_899_345_920, ("0",))
    emit(UTILIZATION, 0.07, ("11",))
    lines = [LINE.fullmatch(message) for message in caplog.messages]
    assert [line and line.group("name", "value", "labels", "type") for line in lines] == [
        (MEMORY_USED, "85899345920", "gpu:0", "GAUGE"),
        (UTILIZATION, "0.07", "gpu:11", "GAUGE"),
    ]
