"""Counters, gauges and histograms of a worker, on their way to TorchServe's Prometheus page.

TorchServe reads a worker's metrics as lines on its stdout. It adds counters up in the frontend, so
they outlive the worker, and keeps the last value of gauges. Its own histograms have fixed buckets;
a histogram here is the three counters that Prometheus makes of one anyway: `_bucket`, `_sum` and
`_count`. Every line costs the frontend a regular expression, so what comes in is collected and
handed over once a second.
"""

import atexit
import fcntl
import logging
import re
import threading
import time
import traceback
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, count
from pathlib import Path
from typing import IO

import psutil
from ts.metrics.caching_metric import CachingMetric
from ts.metrics.metric_type_enum import MetricTypes

from handler.errors import RequestError
from handler.gpus import MEMORY_TOTAL, MEMORY_USED, UTILIZATION
from handler.logs import log_line

FLUSH_SECONDS = 1.0
SLOW_FLUSHES = 15  # flushes between two of what may be many series at a time

MODEL = ("model", "version")
WORKER = (*MODEL, "worker")
GPU = ("gpu",)  # torch's number of it alone: a label may not have the colon of "cuda:0"

OUTCOMES = ("success", *sorted(error.__name__ for error in RequestError.__subclasses__()))
STATUSES = ("200", *sorted({str(error.status) for error in RequestError.__subclasses__()}))
STAGES = ("queue", "preprocess", "inference", "postprocess", "total", "response")


@dataclass(frozen=True)
class Family:
    """A metric. configs/metrics.yaml declares the same, and docs/metrics.md explains it."""

    kind: str  # "counter", "gauge" or "histogram"
    labels: tuple[str, ...]  # those of the worker itself first
    help: str  # what its unit is, because TorchServe writes "… with unit: " before it
    values: tuple[str, ...] = ()  # of the last label, where they are known beforehand
    bounds: tuple[float, ...] = ()  # upper bounds of a histogram's buckets
    slow: bool = False  # handed over in every 15th flush only

    def series(self, name: str) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Each name on Prometheus' page -> its type there and its labels."""
        if self.kind != "histogram":
            return {name: (self.kind, self.labels)}
        return {
            f"{name}_bucket": ("counter", (*self.labels, "le")),
            f"{name}_sum": ("counter", self.labels),
            f"{name}_count": ("counter", self.labels),
        }


REQUESTS = "classifier_requests_total"
PROBES = "classifier_probes_total"
IMAGES = "classifier_images_total"
TOP_CLASSES = "classifier_top_class_total"
CACHE_LOOKUPS = "classifier_cache_lookups_total"
STAGE = "classifier_stage_seconds"
BATCH = "classifier_batch_requests"
IMAGE_BYTES = "classifier_image_bytes"
IMAGE_PIXELS = "classifier_image_pixels"
CONFIDENCE = "classifier_top_confidence_ratio"
MODEL_INFO = "classifier_model_info"
BUILD_INFO = "classifier_build_info"
STARTS = "classifier_worker_starts_total"
HUNG = "classifier_worker_hung_total"
STARTUP = "classifier_worker_startup_seconds"
WARM_UP = "classifier_worker_warmup_seconds"
BUSY = "classifier_worker_busy_seconds_total"
CPU = "classifier_worker_cpu_seconds_total"
MEMORY = "classifier_worker_resident_memory_bytes"
LAST_FLUSH = "classifier_worker_last_flush_timestamp_seconds"

FAMILIES = {
    REQUESTS: Family(
        "counter", (*MODEL, "status"), "requests, by HTTP status of the answer", STATUSES
    ),
    PROBES: Family(
        "counter", (*MODEL, "status"), "health checks, by HTTP status of the answer", ("200",)
    ),
    IMAGES: Family("counter", (*MODEL, "outcome"), "images, by success or error type", OUTCOMES),
    TOP_CLASSES: Family(
        "counter",
        (*MODEL, "class_id", "class"),
        "images, by the class that was found likeliest",
        slow=True,
    ),
    CACHE_LOOKUPS: Family(
        "counter",
        (*MODEL, "result"),
        "images looked up in the result cache, by hit or miss",
        ("hit", "miss"),
    ),
    STAGE: Family(
        "histogram",
        (*MODEL, "stage"),
        "seconds that a request spent in a stage",
        STAGES,
        # Fine where models on CPU and GPU live, coarse where only queues reach.
        (
            *(0.001, 0.002, 0.003, 0.005, 0.0075),
            *(0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
            *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
            *(1, 2, 5, 10, 30),
        ),
    ),
    BATCH: Family(
        "histogram", MODEL, "requests that shared a batch", bounds=(1, 2, 4, 8, 16, 32, 64, 128)
    ),
    IMAGE_BYTES: Family(
        "histogram",
        MODEL,
        "bytes of an encoded image",
        bounds=(10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000),
    ),
    IMAGE_PIXELS: Family(
        "histogram",
        MODEL,
        "pixels of a decoded image, width x height",
        bounds=(100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000),
    ),
    CONFIDENCE: Family(
        "histogram",
        MODEL,
        "probability of the likeliest class of an image, 0 to 1",
        bounds=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1),
    ),
    MODEL_INFO: Family(
        "gauge",
        (*MODEL, "architecture", "weights", "trained", "engine", "precision", "device"),
        "always 1; the labels say what is served",
    ),
    BUILD_INFO: Family(
        "gauge",
        (*MODEL, "archive", "torchserve", "torch", "openvino", "python"),
        "always 1; the labels say what serves it",
    ),
    STARTS: Family("counter", WORKER, "starts of a worker, the first one too"),
    HUNG: Family("counter", WORKER, "workers that hung and were killed, before this one's start"),
    STARTUP: Family("gauge", WORKER, "seconds from a worker's process to ready, warm-up included"),
    WARM_UP: Family("gauge", WORKER, "seconds that a worker warmed up"),
    BUSY: Family("counter", WORKER, "seconds that a worker spent on batches"),
    CPU: Family("counter", WORKER, "seconds of CPU time that a worker used"),
    MEMORY: Family("gauge", WORKER, "bytes of memory that a worker holds"),
    LAST_FLUSH: Family("gauge", WORKER, "seconds since 1970 when a worker last reported"),
    MEMORY_USED: Family("gauge", GPU, "bytes of a GPU's memory in use, by whomever"),
    MEMORY_TOTAL: Family("gauge", GPU, "bytes of memory that a GPU has"),
    UTILIZATION: Family("gauge", GPU, "share of time in which a GPU was computing, 0 to 1"),
}

Emit = Callable[[str, float, Sequence[str]], None]  # name on Prometheus' page, value, label values
Reading = tuple[str, float, tuple[str, ...]]  # name, value or increment, label values


class _Histogram:
    """Observations of one series since the last flush."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # not cumulative; the last is above all bounds
        self.sum = 0.0


class Metrics:
    """What has come since the last flush. Safe to use from several threads."""

    def __init__(self, emit: Emit, model: str, version: str, worker: str = "0") -> None:
        """`emit` is called from `flush` only."""
        self._emit = emit
        self._own = {"model": model, "version": version, "worker": worker}
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._slow_counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._histograms: dict[tuple[str, tuple[str, ...]], _Histogram] = {}
        # Called at each flush, for what is read and not counted: gauges, above all.
        self.readers: list[Callable[[], Iterable[Reading]]] = []
        # Series exist from the start at 0, so that the first increase is not lost to rate().
        for name, family in FAMILIES.items():
            if family.kind != "gauge" and not family.slow:
                for value in family.values or [None]:
                    labels = () if value is None else (value,)
                    if family.kind == "counter":
                        self.add(name, 0, *labels)
                    else:
                        self._histograms[name, labels] = _Histogram(family.bounds)

    def add(self, name: str, amount: float, *labels: str) -> None:
        """Raise a counter; `labels` are the values of those that are not the worker's own."""
        with self._lock:
            counts = self._slow_counts if FAMILIES[name].slow else self._counts
            counts[name, labels] += amount  # type: ignore[assignment]  # typed for int, adds floats

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Add one value to a histogram."""
        with self._lock:
            series = self._histograms.get((name, labels))
            if series is None:
                bounds = FAMILIES[name].bounds
                series = self._histograms[name, labels] = _Histogram(bounds)
            series.counts[bisect_left(series.bounds, value)] += 1  # a bound is in its own bucket
            series.sum += value

    def set(self, name: str, value: float, *labels: str) -> None:
        """Hand a gauge over at once."""
        self._send(name, value, labels)

    def flush(self, everything: bool = True) -> None:
        """Hand over what has come since the last time; slow metrics only with `everything`."""
        with self._flushing:
            with self._lock:
                counts, self._counts = self._counts, Counter()
                histograms, self._histograms = self._histograms, {}
                if everything:
                    counts.update(self._slow_counts)
                    self._slow_counts = Counter()
            for (name, labels), increment in counts.items():
                self._send(name, increment, labels)
            for (name, labels), series in histograms.items():
                self._send_histogram(name, labels, series)
            for reader in self.readers:
                for name, value, labels in reader():
                    self._send(name, value, labels)

    def _send(self, name: str, value: float, labels: tuple[str, ...], series: str = "") -> None:
        own = [self._own[label] for label in FAMILIES[name].labels if label in self._own]
        self._emit(series or name, value, (*own, *labels))

    def _send_histogram(self, name: str, labels: tuple[str, ...], series: _Histogram) -> None:
        """The largest bucket first: one is never below a smaller one, whenever it is scraped."""
        cumulative = list(accumulate(series.counts))
        self._send(name, series.sum, labels, f"{name}_sum")
        self._send(name, cumulative[-1], labels, f"{name}_count")
        bounds = [*map(str, series.bounds), "+Inf"]
        first = cumulative[-1] == 0  # nothing was observed: the series are being made
        for bound, increment in zip(reversed(bounds), reversed(cumulative), strict=True):
            if increment or first:
                self._send(name, increment, (*labels, bound), f"{name}_bucket")

    def start(self) -> None:
        """Flush every second from a thread that ends with the process, and at an orderly end."""
        process = psutil.Process()
        cpu_seconds = 0.0

        def read_worker() -> Iterable[Reading]:
            nonlocal cpu_seconds
            used = time.process_time()
            yield CPU, used - cpu_seconds, ()
            cpu_seconds = used
            yield MEMORY, process.memory_info().rss, ()
            yield LAST_FLUSH, time.time(), ()

        def run() -> None:
            for number in count(1):
                time.sleep(FLUSH_SECONDS)
                try:
                    self.flush(everything=number % SLOW_FLUSHES == 0)
                except Exception:
                    log_line(logging.ERROR, "metrics_failed", cause=traceback.format_exc())

        self.readers.append(read_worker)
        atexit.register(self.flush)
        threading.Thread(target=run, name="metrics", daemon=True).start()


@lru_cache(maxsize=4096)
def label_value(text: str) -> str:
    """A label's value as it passes through TorchServe.

    Its lines are taken apart at "|", "," and ":", and an empty value loses the sample. ASCII only,
    because its reader breaks lines at U+2028 as well.
    """
    return re.sub(r"[^ -~]|[|,:]", "_", text).strip() or "_"


def torchserve_emit() -> Emit:
    """Emit as TorchServe's own metrics do; the frontend adds the label `Hostname`.

    What the frontend's metrics.yaml does not declare it drops, so an archive that runs in a
    TorchServe with other metrics loses these and nothing else.
    """
    metrics = {
        # The unit in a line is not used: HELP has the one of metrics.yaml.
        series: CachingMetric(series, "Count", [*labels], MetricTypes(kind))
        for name, family in FAMILIES.items()
        for series, (kind, labels) in family.series(name).items()
    }

    def emit(name: str, value: float, labels: Sequence[str]) -> None:
        metrics[name].add_or_update(value, [label_value(label) for label in labels])

    return emit


_held: list[IO[str]] = []  # locks of this process, until it ends


def claim_slot(folder: Path) -> str:
    """The lowest number that no other living worker has claimed in a folder.

    A worker that is started in the place of another gets its number, so the label stays the same
    after a restart and there are never more of them than workers. (TorchServe's own numbers, the
    sockets', rise with each scaling up.)
    """
    slot = 0
    while True:
        file = (folder / f".worker-{slot}").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            slot += 1
        else:
            _held.append(file)
            return str(slot)
