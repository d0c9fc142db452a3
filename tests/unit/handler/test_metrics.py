"""Metrics: complete, handed over once, and in the form that TorchServe reads."""

import logging
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from handler import collector
from handler.collector import Metrics, Reading
from handler.metrics import (
    BATCH,
    CACHE_LOOKUPS,
    CONFIDENCE,
    FAMILIES,
    IMAGES,
    LAST_FLUSH,
    MEMORY,
    MODEL_INFO,
    REQUESTS,
    STAGE,
    STAGES,
    STARTS,
    TOP_CLASSES,
)
from handler.torchserve_metrics import label_value, leave_out_prediction_time
from handler.torchserve_metrics import torchserve_emit as emit_to_torchserve

MODEL = ("birds", "1.0")
BOUNDS = FAMILIES[STAGE].bounds
HISTOGRAMS = [name for name, family in FAMILIES.items() if family.kind == "histogram"]

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
        series = (name, (*MODEL, *labels))
        return sum(value for name, labels, value in self.emitted if (name, labels) == series)


def recorded() -> tuple[Metrics, Recorder]:
    """Metrics whose series exist already, and what they emit from now on."""
    recorder = Recorder()
    metrics = Metrics(recorder, *MODEL)
    metrics.flush()
    recorder.emitted.clear()
    return metrics, recorder


def buckets(recorder: Recorder, stage: str) -> list[float]:
    bounds = [*map(str, BOUNDS), "+Inf"]
    return [recorder.total(f"{STAGE}_bucket", stage, bound) for bound in bounds]


def test_series_that_matter_exist_before_the_first_request() -> None:
    recorder = Recorder()
    Metrics(recorder, *MODEL).flush()
    assert {value for *_, value in recorder.emitted} == {0}
    seen = {(name, *labels) for name, labels, _ in recorder.emitted}
    statuses = ("200", "400", "413", "415", "500", "507")
    assert {(REQUESTS, *MODEL, status) for status in statuses} <= seen
    assert {(IMAGES, *MODEL, outcome) for outcome in ("success", "UnreadableImage")} <= seen
    assert {(CACHE_LOOKUPS, *MODEL, result) for result in ("hit", "miss")} <= seen
    for bound in (*map(str, BOUNDS), "+Inf"):
        assert {(f"{STAGE}_bucket", *MODEL, stage, bound) for stage in STAGES} <= seen
    assert (f"{BATCH}_sum", *MODEL) in seen
    assert (STARTS, *MODEL, "0") in seen
    assert not any(name == TOP_CLASSES for name, *_ in seen)


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_bucket_bounds_rise(name: str) -> None:
    bounds = FAMILIES[name].bounds
    assert list(bounds) == sorted(set(bounds))


@pytest.mark.parametrize("index", range(len(BOUNDS)))
def test_a_bound_belongs_to_its_bucket(index: int) -> None:
    """Prometheus: le is "less or equal"."""
    metrics, recorder = recorded()
    metrics.observe(STAGE, BOUNDS[index], "total")
    metrics.flush()
    assert buckets(recorder, "total") == [0] * index + [1] * (len(BOUNDS) - index + 1)


def test_buckets_are_cumulative() -> None:
    metrics, recorder = recorded()
    durations = [0.0005, 0.003, 0.003, 0.2, 7.0, 60.0]
    for seconds in durations:
        metrics.observe(STAGE, seconds, "inference")
    metrics.flush()
    counts = buckets(recorder, "inference")
    bounds = [*BOUNDS, float("inf")]
    assert counts == [sum(seconds <= bound for seconds in durations) for bound in bounds]
    assert recorder.total(f"{STAGE}_count", "inference") == len(durations)
    assert recorder.total(f"{STAGE}_sum", "inference") == pytest.approx(sum(durations))


def test_a_scrape_between_two_lines_sees_rising_buckets() -> None:
    metrics, recorder = recorded()
    for seconds in (0.0001, 0.004, 0.4, 100.0):
        metrics.observe(STAGE, seconds, "total")
    metrics.flush()
    seen = list(recorder.emitted)
    for end in range(len(seen) + 1):
        recorder.emitted = seen[:end]
        counts = buckets(recorder, "total")
        assert counts == sorted(counts)
        assert recorder.total(f"{STAGE}_count", "total") >= counts[-1]


def test_buckets_that_stay_are_not_handed_over() -> None:
    """Each is a line that TorchServe takes apart."""
    metrics, recorder = recorded()
    metrics.observe(CONFIDENCE, 0.97)
    metrics.flush()
    names = [labels[-1] for name, labels, _ in recorder.emitted if name == f"{CONFIDENCE}_bucket"]
    assert names == ["+Inf", "1", "0.99"]


def test_a_series_is_emitted_once_and_at_the_next_flush() -> None:
    metrics, recorder = recorded()
    for _ in range(10):
        metrics.add(REQUESTS, 1, "200")
        metrics.observe(STAGE, 0.1, "total")
    assert recorder.emitted == []
    metrics.flush()
    metrics.flush()
    series = Counter((name, labels) for name, labels, _ in recorder.emitted)
    assert set(series.values()) == {1}


def test_slow_metrics_wait_and_lose_nothing() -> None:
    metrics, recorder = recorded()
    for _ in range(2):
        metrics.add(TOP_CLASSES, 1, "7", "wren")
        metrics.flush(everything=False)
    assert recorder.emitted == []
    metrics.flush()
    metrics.flush()
    assert recorder.emitted == [(TOP_CLASSES, (*MODEL, "7", "wren"), 2)]


def test_gauges_go_at_once() -> None:
    metrics, recorder = recorded()
    metrics.set(MEMORY, 5.0)
    assert recorder.emitted == [(MEMORY, (*MODEL, "0"), 5.0)]


def test_readers_are_asked_at_each_flush() -> None:
    metrics, recorder = recorded()
    readings = iter([1.0, 2.0])

    def read() -> Iterable[Reading]:
        yield MEMORY, next(readings), ()

    metrics.readers.append(read)
    metrics.flush(everything=False)
    metrics.flush()
    assert [value for *_, value in recorder.emitted] == [1.0, 2.0]


def test_nothing_is_lost_between_threads() -> None:
    metrics, recorder = recorded()
    done = threading.Event()

    def count() -> None:
        for _ in range(500):
            metrics.add(REQUESTS, 1, "200")
            metrics.observe(STAGE, 0.1, "total")

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


def test_a_started_thread_flushes_and_outlives_a_reader_that_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(collector, "FLUSH_SECONDS", 0.01)
    monkeypatch.setattr("atexit.register", lambda _: None)
    counted = threading.Event()
    seen: dict[str, float] = {}
    failures = iter([OSError("the GPU is gone")])

    def emit(name: str, increment: float, labels: Sequence[str]) -> None:
        seen[name] = increment
        if name == REQUESTS and labels[-1] == "418":
            counted.set()

    def read() -> Iterable[Reading]:
        for failure in failures:
            raise failure
        metrics.add(REQUESTS, 1, "418")
        return ()

    metrics = Metrics(emit, *MODEL)
    metrics.readers.append(read)
    metrics.start()
    assert counted.wait(10)
    assert "the GPU is gone" in caplog.text
    assert seen[MEMORY] > 1_000_000
    assert seen[LAST_FLUSH] > 1_700_000_000


def test_an_orderly_end_flushes() -> None:
    program = f"""
from handler.collector import Metrics
metrics = Metrics(lambda name, value, labels: print(name, value, *labels), "birds", "1.0")
metrics.start()
metrics.add({REQUESTS!r}, 7, "200")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0
    assert f"{REQUESTS} 7 birds 1.0 200" in done.stdout


# --- Workers


def test_slots_are_those_that_no_living_worker_has(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from handler.slots import claim_slot; "
        f"print(claim_slot(Path({str(tmp_path)!r})), flush=True); sys.stdin.read()"
    )

    def worker() -> tuple["subprocess.Popen[str]", str]:
        command = [sys.executable, "-c", program]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        return process, process.stdout.readline().strip()

    workers = [worker() for _ in range(3)]
    try:
        assert [slot for _, slot in workers] == ["0", "1", "2"]
        workers[1][0].kill()
        workers[1][0].wait()
        workers.append(worker())
        assert workers[-1][1] == "1"
    finally:
        for process, _ in workers:
            process.kill()
            process.communicate()


# --- On the way to TorchServe


@pytest.mark.parametrize("name", FAMILIES)
def test_names_are_those_of_prometheus_conventions(name: str) -> None:
    """https://prometheus.io/docs/practices/naming/: base units, and _total for what is counted."""
    family = FAMILIES[name]
    assert re.fullmatch(r"classifier(_[a-z]+)+", name)
    assert name.endswith("_total") == (family.kind == "counter")
    units = ("_seconds", "_bytes", "_ratio", "_pixels", "_requests", "_images", "_levels", "_info")
    assert family.kind == "counter" or name.endswith(units)


def test_lines_are_what_torchserve_reads(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ts.metrics")
    metrics = Metrics(emit_to_torchserve(), "birds", "1.0")
    metrics.add(REQUESTS, 1, "200")
    metrics.add(TOP_CLASSES, 1, "7", "a: b, c|\u2028d")
    metrics.observe(STAGE, 1.5e-7, "total")
    metrics.set(MODEL_INFO, 1, "resnet50", "é:1.pth", "true", "e", "", "cuda")
    metrics.set(MEMORY, 123456789012)
    metrics.flush()
    lines = [LINE.fullmatch(message) for message in caplog.messages]
    assert all(lines), caplog.messages
    seen = {(line["name"], line["labels"]): line["value"] for line in lines if line}
    assert seen[REQUESTS, "model:birds,version:1.0,status:200"] == "1"
    assert seen[TOP_CLASSES, "model:birds,version:1.0,class_id:7,class:a_ b_ c__d"] == "1"
    assert seen[f"{STAGE}_bucket", "model:birds,version:1.0,stage:total,le:+Inf"] == "1"
    assert float(seen[f"{STAGE}_sum", "model:birds,version:1.0,stage:total"]) == 1.5e-7
    assert seen[MEMORY, "model:birds,version:1.0,worker:0"] == "123456789012"
    # The frontend splits at "," and then at ":", and each half must be there.
    for line in lines:
        assert line
        pairs = [pair.split(":") for pair in line["labels"].split(",")]
        assert all(len(pair) == 2 and all(pair) for pair in pairs), line["labels"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("cuda:0", "cuda_0"), ("a,b|c", "a_b_c"), ("", "_"), (" ", "_"), ("analog clock",) * 2],
)
def test_label_values(text: str, value: str) -> None:
    assert label_value(text) == value


def test_torchserves_prediction_time_is_not_sent(caplog: pytest.LogCaptureFixture) -> None:
    """Its worker adds it after each batch (ts/service.py)."""
    caplog.set_level(logging.INFO)
    config = Path(collector.__file__).parent / "configs" / "metrics.yaml"
    cache = MetricsCacheYamlImpl(str(config))
    cache.initialize_cache()
    cache.set_request_ids({0: "id-0"})
    cache.model_name = "birds"
    leave_out_prediction_time(cache)
    for name in ("PredictionTime", "OtherTime"):
        cache.add_time(name, 1.5)
    assert re.findall(r"\[METRICS\](\w+)", caplog.text) == ["OtherTime"]
