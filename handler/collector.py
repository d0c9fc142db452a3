"""The values of a worker's metrics, on their way to TorchServe.

TorchServe reads metrics as lines on a worker's stdout. It adds up counters in the frontend, so that
they outlive the worker, and keeps the last value of gauges. Its own histograms have fixed buckets;
a histogram here is therefore the three counters that Prometheus makes of one anyway: `_bucket`,
`_sum` and `_count`. Each line costs the frontend a regular expression, so increments are collected
and handed over every five seconds.
"""

import atexit
import logging
import threading
import time
import traceback
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, count

import psutil

from handler.logs import log_line
from handler.metrics import CPU, FAMILIES, LAST_FLUSH, MEMORY

FLUSH_SECONDS = 5.0
SLOW_FLUSHES = 3  # metrics with many series are handed over in every third flush

Emit = Callable[[str, float, Sequence[str]], None]  # name on Prometheus' page, value, label values
Reading = tuple[str, float, tuple[str, ...]]  # name, value or increment, label values


class _Histogram:
    """Observations of one series since the last flush."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # not cumulative; the last is above all bounds
        self.sum = 0.0


class Metrics:
    """Collects values and hands them over in flushes. Safe to use from several threads."""

    def __init__(self, emit: Emit, model: str, version: str, worker: str = "0") -> None:
        """`emit` gets what is to be handed over, from `flush` and `set`."""
        self._emit = emit
        self._own = {"model": model, "version": version, "worker": worker}
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._slow_counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._histograms: dict[tuple[str, tuple[str, ...]], _Histogram] = {}
        # Called at each flush for values that are read and not counted, such as gauges.
        self.readers: list[Callable[[], Iterable[Reading]]] = []
        # Series exist at 0 from the start, so that rate() sees the first increment.
        for name, family in FAMILIES.items():
            if family.kind != "gauge" and not family.slow:
                for value in family.values or [""]:
                    series = name, (value,) if value else ()
                    if family.kind == "counter":
                        self._counts[series] = 0
                    else:
                        self._histograms[series] = _Histogram(family.bounds)

    def add(self, name: str, amount: float, *labels: str) -> None:
        """Raise a counter; `labels` are the values of the labels that are not the worker's own."""
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
        """Hand over what was collected since the last flush; slow metrics only if `everything`."""
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
        """Hand over the largest bucket first, so that no scrape finds one below a smaller one."""
        cumulative = list(accumulate(series.counts))
        self._send(name, series.sum, labels, f"{name}_sum")
        self._send(name, cumulative[-1], labels, f"{name}_count")
        bounds = [*map(str, series.bounds), "+Inf"]
        first = cumulative[-1] == 0  # nothing was observed: the series are being created
        for bound, increment in zip(reversed(bounds), reversed(cumulative), strict=True):
            if increment or first:
                self._send(name, increment, (*labels, bound), f"{name}_bucket")

    def start(self) -> None:
        """Flush regularly, from a thread that ends with the process, and at an orderly exit."""
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
