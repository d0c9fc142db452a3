"""What the metrics and the log say about a worker and its requests."""

import logging
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from time import time
from typing import Any

import psutil

from handler import metrics
from handler.batch import Row
from handler.cache import Result
from handler.engine import Engine
from handler.headers import is_probe, read_queue_seconds, read_traceparent
from handler.logs import log_lines
from handler.metrics import Metrics
from handler.model_card import ModelCard
from handler.payloads import ImageRequest

LOGGED_STAGES = ("preprocess", "inference", "postprocess", "total")


def milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


def describe_worker(counts: Metrics, card: ModelCard, engine: Engine) -> None:
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
    libraries = [version(name) for name in ("torchserve", "torch", "openvino")]
    python = platform.python_version()
    counts.set(metrics.BUILD_INFO, 1, card.inputs_sha256[:12], *libraries, python)


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
    if isinstance(row.request, ImageRequest):
        for data in row.request.images:
            if isinstance(data, bytes):
                counts.observe(metrics.IMAGE_BYTES, len(data))
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


def log_rows(rows: Sequence[Row], identity: Mapping[str, str], arrival: float) -> None:
    """Write the lines of a batch's finished requests, without those of health checks."""
    log_lines(
        "request",
        (
            (
                logging.ERROR if row.status >= 500 else logging.INFO,
                _describe(row, identity, arrival, batch=len(rows)),
            )
            for row in rows
            if not is_probe(row.headers)
        ),
    )


def _describe(row: Row, identity: Mapping[str, str], arrival: float, batch: int) -> dict[str, Any]:
    """What a request's line says."""
    queue = read_queue_seconds(row.headers, arrival)
    best = next(iter(row.best), {})
    errors = row.errors
    return dict(
        request_id=row.request_id,
        traceparent=read_traceparent(row.headers),
        **identity,
        status=row.status,
        images=len(row.images),
        cached=sum(image.cached for image in row.images),
        batch=batch,
        queue_ms=None if queue is None else milliseconds(queue),
        **{f"{stage}_ms": milliseconds(row.seconds.get(stage, 0)) for stage in LOGGED_STAGES},
        top_class=best.get("class"),
        confidence=best.get("confidence"),
        error=type(errors[0]).__name__ if errors else None,
    )
