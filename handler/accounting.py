"""What the metrics and the log say about a worker and its requests."""

import atexit
import logging
import platform
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from threading import Lock, Thread
from time import sleep, time
from typing import Any, NamedTuple

import psutil

from handler import metrics
from handler.batch import Classified, Row
from handler.cache import Result
from handler.certificate import Certificate
from handler.collector import Metrics
from handler.confidence import Confidence
from handler.decoders import Decoder
from handler.drift import Reference, brightness
from handler.engine import Engine
from handler.headers import is_probe, read_queue_seconds, read_traceparent
from handler.logs import Line, log_line, log_lines
from handler.model_card import ModelCard
from handler.settings import Settings

SETTLE_SECONDS = 0.25
SAMPLE_SECONDS = 1.0  # between two images whose distance is taken: each costs 0.5 ms
LOGGED_STAGES = ("preprocess", "inference", "postprocess", "total")
COMPUTING = ("torch", "openvino", "simplejpeg", "pillow")  # what decodes and computes answers
SHA256_BYTES = 32
ARCHIVE_DIGITS = 12  # of the digest of an archive's inputs, in metrics and log


def milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


def describe_worker(
    counts: Metrics, card: ModelCard, engine: Engine, certificate: Certificate | None
) -> None:
    """Set the gauges that stay as they are until the worker ends."""
    counts.set(metrics.STARTUP, time() - psutil.Process().create_time())
    counts.set(
        metrics.MODEL_INFO,
        1,
        card.architecture,
        card.weights.name,
        str(card.weights.trained).lower(),
        engine.name,
        engine.precision,
        engine.device.partition(":")[0],  # the workers' GPUs may differ
    )
    if certificate:
        if certificate.logits_error is not None:
            counts.set(metrics.CERTIFICATE_ERROR, certificate.logits_error)
        counts.set(metrics.CERTIFICATE_AGREEMENT, certificate.class_agreement)
        counts.set(metrics.CERTIFICATE_DECODE, certificate.decode_difference)
        counts.set(metrics.CERTIFICATE_SECONDS, certificate.seconds)
    libraries = [version(name) for name in ("torchserve", "torch", "openvino")]
    python = platform.python_version()
    archive = card.inputs_sha256[:ARCHIVE_DIGITS]
    counts.set(metrics.BUILD_INFO, 1, archive, *libraries, python)

    if card.reference:
        counts.set(metrics.DRIFT_REFERENCE_IMAGES, card.reference.images)
        for signal, bins in card.reference.signals.items():
            for label, share in zip(bins.labels, bins.shares, strict=True):
                counts.set(metrics.DRIFT_REFERENCE, share, signal, label)
                counts.add(metrics.DRIFT, 0, signal, label)  # increase() needs the series at 0


def describe_answers(
    card: ModelCard, engine: Engine, decoder: Decoder, settings: Settings
) -> dict[str, Any]:
    """What an answer depends on besides the image, for each line of a request.

    ./scripts/replay computes the answer again from it.
    """
    return {
        "archive": card.inputs_sha256[:ARCHIVE_DIGITS],
        "engine": engine.name,
        "decoder": decoder.name,
        "decode": settings.decode,
        "libraries": {name: version(name) for name in COMPUTING},
    }


class _Batch(NamedTuple):
    rows: Sequence[Row]
    seconds: float
    arrival: float  # Unix time
    sample: Classified | None  # one of the images


class Accounts:
    """Counts and logs finished requests, those of a quarter of a second together.

    One by one they would add a quarter of a millisecond to each batch: after a forward pass, none
    of this code is in the CPU's caches.
    """

    def __init__(
        self,
        counts: Metrics,
        constants: Mapping[str, Any],
        log_requests: bool,
        reference: Reference | None = None,
        confidence: Confidence | None = None,
    ) -> None:
        """`constants` go into every line of the log; drift is counted if there is a reference."""
        self.counts = counts
        self._reference = reference
        self._confidence = confidence
        self._sampled = 0.0  # Unix time
        self._constants = constants
        self._log_requests = log_requests
        self._batches: deque[_Batch] = deque()
        self._settling = Lock()

    def add(self, rows: Sequence[Row], seconds: float, arrival: float) -> None:
        """A finished batch, which took some seconds from its arrival (a Unix time)."""
        sample = None
        if self._reference:  # before a row lets go of an image that another has as well
            for row in rows:
                row.brightness = [brightness(pixels) for pixels, _ in row.classified()]
            # The clock may be set back.
            if self._confidence and not 0 <= arrival - self._sampled < SAMPLE_SECONDS:
                sampled = (row.classified() for row in rows if not is_probe(row.headers))
                if sample := next(chain.from_iterable(sampled), None):
                    self._sampled = arrival
        for row in rows:
            row.release()
        self._batches.append(_Batch(rows, seconds, arrival, sample))

    def settle(self) -> None:
        """Count and log what was added. A batch that raises is reported, and the others go on."""
        with self._settling:
            lines: list[Line] = []
            while self._batches:
                try:
                    lines += self._count(self._batches.popleft())
                except Exception:
                    log_line(logging.ERROR, "accounts_failed", cause=traceback.format_exc())
            log_lines("request", lines)

    def _count(self, batch: _Batch) -> list[Line]:
        """Count a batch; the lines are those of its requests."""
        self.counts.add(metrics.BUSY, batch.seconds)
        self.counts.observe(metrics.BATCH, len(batch.rows))
        for row in batch.rows:
            row.seconds["total"] = batch.seconds
            count_row(self.counts, row, batch.arrival)
            if self._reference and not is_probe(row.headers):
                count_drift(self.counts, self._reference, row)
        if self._reference and self._confidence and batch.sample:
            distance = self._confidence.distance(*batch.sample)
            count_signals(self.counts, self._reference, {"distance": [distance]})
        logged = [row for row in batch.rows if self._log_requests and not is_probe(row.headers)]
        return [_line(row, self._constants, batch) for row in logged]

    def start(self) -> None:
        """Settle regularly, from a thread that ends with the process, and at an orderly exit."""

        def run() -> None:
            while True:
                sleep(SETTLE_SECONDS)
                self.settle()

        atexit.register(self.settle)
        Thread(target=run, name="accounts", daemon=True).start()


def count_row(counts: Metrics, row: Row, arrival: float) -> None:
    """Count a finished request and its images; `arrival` is a Unix time."""
    if is_probe(row.headers):
        counts.add(metrics.PROBES, 1, str(row.status))
        return
    counts.add(metrics.REQUESTS, 1, str(row.status))
    for stage, seconds in row.seconds.items():
        counts.observe(metrics.STAGE, seconds, stage)
    queue = read_queue_seconds(row.headers, arrival)
    if queue is not None:
        counts.observe(metrics.STAGE, queue, "queue")
    counts.observe(metrics.STAGE, row.seconds["total"] + (queue or 0), "response")
    for error in row.errors:
        counts.add(metrics.IMAGES, 1, type(error).__name__)
    for size in row.image_bytes:
        counts.observe(metrics.IMAGE_BYTES, size)
    for image in row.images:
        if isinstance(image.outcome, Result):
            width, height = image.outcome.size
            counts.observe(metrics.IMAGE_PIXELS, width * height)
        if image.cached or image.key:
            counts.add(metrics.CACHE_LOOKUPS, 1, "hit" if image.cached else "miss")
    for best in row.best:
        counts.add(metrics.IMAGES, 1, "success")
        counts.add(metrics.TOP_CLASSES, 1, str(best["class_id"]), best["class"])
        counts.observe(metrics.CONFIDENCE, best["confidence"])


def count_drift(counts: Metrics, reference: Reference, row: Row) -> None:
    """Count the images of a finished request by the bins of their signals."""
    sizes = [image.outcome.size for image in row.images if isinstance(image.outcome, Result)]
    values = {
        "confidence": [best["confidence"] for best in row.best],
        "class": [best["class_id"] for best in row.best],
        "brightness": row.brightness,
        "size": [width * height for width, height in sizes],
    }
    count_signals(counts, reference, values)


def count_signals(
    counts: Metrics, reference: Reference, values: Mapping[str, Sequence[float]]
) -> None:
    """Count values by the bins of their signals; an older archive has no bins for some."""
    for signal in values.keys() & reference.signals.keys():
        bins = reference.signals[signal]
        for value in values[signal]:
            counts.add(metrics.DRIFT, 1, signal, bins.labels[bins.index(value)])


def _sha256(row: Row) -> str | None:
    """That of a request's only image, which a cache's key begins with; None without a cache."""
    key = row.images[0].key if len(row.images) == 1 else None
    return key[:SHA256_BYTES].hex() if key else None


def _line(row: Row, constants: Mapping[str, Any], batch: _Batch) -> Line:
    """The log's line of a request."""
    queue = read_queue_seconds(row.headers, batch.arrival)
    best = next(iter(row.best), {})
    errors = row.errors
    facts = dict(
        request_id=row.request_id,
        traceparent=read_traceparent(row.headers),
        **constants,
        status=row.status,
        images=len(row.images),
        image_bytes=sum(row.image_bytes),
        image_sha256=_sha256(row),
        cached=sum(image.cached for image in row.images),
        batch=len(batch.rows),
        queue_ms=None if queue is None else milliseconds(queue),
        **{f"{stage}_ms": milliseconds(row.seconds.get(stage, 0)) for stage in LOGGED_STAGES},
        top_class=best.get("class"),
        confidence=best.get("confidence"),
        error=type(errors[0]).__name__ if errors else None,
    )
    level = logging.ERROR if row.status >= 500 else logging.INFO
    return Line(batch.arrival + batch.seconds, level, facts)
