"""Counters and histograms of a worker, on their way to TorchServe's Prometheus page.

TorchServe reads a worker's metrics as lines on its stdout and adds them up in the frontend, so they
outlive the worker. Its own histograms have fixed buckets; a histogram here is the three counters
that Prometheus makes of one anyway: `_bucket`, `_sum` and `_count`. Every line costs the frontend a
regular expression, so increments are collected and handed over once a second.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from ts.metrics.caching_metric import CachingMetric
from ts.metrics.metric_type_enum import MetricTypes

from handler.gpus import GAUGES, Gauge

FLUSH_SECONDS = 1.0

# Upper bounds in seconds: fine where a CPU model lives, coarse where only queues reach.
STAGE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

REQUESTS = "classifier_requests_total"
IMAGES = "classifier_images_total"
STAGE = "classifier_stage_seconds"

# Name -> unit and labels; configs/metrics.yaml declares the same to the frontend.
COUNTERS = {
    REQUESTS: ("Count", ("model", "version", "status")),
    IMAGES: ("Count", ("model", "version", "outcome")),
    f"{STAGE}_bucket": ("Count", ("model", "version", "stage", "le")),
    f"{STAGE}_sum": ("Seconds", ("model", "version", "stage")),
    f"{STAGE}_count": ("Count", ("model", "version", "stage")),
}

Emit = Callable[[str, float, Sequence[str]], None]


class Metrics:
    """Increments since the last flush. Safe to use from several threads."""

    def __init__(self, emit: Emit, model: str, version: str) -> None:
        """`emit(name, increment, label values)` is called from `flush` only."""
        self._emit = emit
        self._labels = (model, version)
        self._increments: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._lock = threading.Lock()
        # Series that exist from the start at 0, so that the first increase is not lost to rate().
        self._increments[REQUESTS, (*self._labels, "200")] = 0
        self._increments[IMAGES, (*self._labels, "success")] = 0

    def count_request(self, status: int) -> None:
        with self._lock:
            self._increments[REQUESTS, (*self._labels, str(status))] += 1

    def count_image(self, outcome: str) -> None:
        """`outcome` is "success" or the name of a RequestError."""
        with self._lock:
            self._increments[IMAGES, (*self._labels, outcome)] += 1

    def observe(self, stage: str, seconds: float) -> None:
        """Add one duration to the histogram of a stage; its buckets are cumulative."""
        labels = (*self._labels, stage)
        with self._lock:
            for bound in STAGE_BUCKETS:
                self._increments[f"{STAGE}_bucket", (*labels, f"{bound:g}")] += seconds <= bound
            self._increments[f"{STAGE}_bucket", (*labels, "+Inf")] += 1
            # Counter is typed for int, and adds floats as well
            self._increments[f"{STAGE}_sum", labels] += seconds  # type: ignore[assignment]
            self._increments[f"{STAGE}_count", labels] += 1

    def flush(self) -> None:
        """Hand over what has come since the last time."""
        with self._lock:
            increments, self._increments = self._increments, Counter()
        for (name, labels), increment in increments.items():
            self._emit(name, increment, labels)

    def start(self, read_gauges: Callable[[], Iterable[Gauge]] = tuple) -> None:
        """Flush and read the gauges every second, in a thread that ends with the process."""

        def run() -> None:
            while True:
                time.sleep(FLUSH_SECONDS)
                self.flush()
                for name, value, labels in read_gauges():
                    self._emit(name, value, labels)

        threading.Thread(target=run, name="metrics", daemon=True).start()


def torchserve_emit() -> Emit:
    """Emit as TorchServe's own metrics do; the frontend adds the label `Hostname`.

    What the frontend's metrics.yaml does not declare it drops, so an archive that runs in a
    TorchServe with other metrics loses these and nothing else.
    """
    metrics = {
        name: CachingMetric(name, unit, [*labels], kind)
        for kind, declared in ((MetricTypes.COUNTER, COUNTERS), (MetricTypes.GAUGE, GAUGES))
        for name, (unit, labels) in declared.items()
    }

    def emit(name: str, value: float, labels: Sequence[str]) -> None:
        metrics[name].add_or_update(value, list(labels))

    return emit
