"""The metrics of a worker: their declarations."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from handler.errors import RequestError
from handler.gpus import MEMORY_TOTAL, MEMORY_USED, UTILIZATION

MODEL = ("model", "version")
WORKER = (*MODEL, "worker")
GPU = ("gpu",)  # torch's number of the GPU, because a label may not have the colon of "cuda:0"

OUTCOMES = ("success", *sorted(error.__name__ for error in RequestError.__subclasses__()))
STATUSES = ("200", *sorted({str(error.status) for error in RequestError.__subclasses__()}))
STAGES = ("queue", "preprocess", "inference", "postprocess", "total", "response")


@dataclass(frozen=True)
class Family:
    """What TorchServe, Prometheus and docs/metrics.md are told about a metric.

    After a change, ./scripts/generate writes configs/metrics.yaml and the tables of the document.
    """

    kind: str  # "counter", "gauge" or "histogram"
    labels: tuple[str, ...]  # those of the worker itself first
    help: str  # begins with the unit, because TorchServe writes "… with unit: " before it
    note: str = ""  # what docs/metrics.md says besides
    values: tuple[str, ...] = ()  # of the last label, if they are known beforehand
    bounds: tuple[float, ...] = ()  # upper bounds of a histogram's buckets
    slow: bool = False  # handed over in every third flush only

    def series(self, name: str) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Each name on Prometheus' page -> its type there and its labels."""
        if self.kind != "histogram":
            return {name: (self.kind, self.labels)}
        return {
            f"{name}_bucket": ("counter", (*self.labels, "le")),
            f"{name}_sum": ("counter", self.labels),
            f"{name}_count": ("counter", self.labels),
        }


FAMILIES: dict[str, Family] = {}


def _declare(kind: str, name: str, *about: Any, **more: Any) -> str:
    """Add a metric, of which the rest are the fields of Family; its name is what others use."""
    FAMILIES[name] = Family(kind, *about, **more)
    return name


_counter = partial(_declare, "counter")
_gauge = partial(_declare, "gauge")
_histogram = partial(_declare, "histogram")

REQUESTS = _counter(
    "classifier_requests_total",
    (*MODEL, "status"),
    "requests, by HTTP status of the answer",
    "What TorchServe answers by itself (404, 503 if the queue is full, 413 for an oversized body, "
    "500 if a worker died) is only in its `Requests4XX` and `Requests5XX`.",
    values=STATUSES,
)
PROBES = _counter(
    "classifier_probes_total",
    (*MODEL, "status"),
    "health checks, by HTTP status of the answer",
    "A health check is a prediction with the header `X-Probe: 1`, from the gateway or "
    "`./scripts/healthcheck`. It is in no other count of requests and images here and has no line "
    "in the log; TorchServe's own counters include it.",
    values=("200",),
)
IMAGES = _counter(
    "classifier_images_total",
    (*MODEL, "outcome"),
    "images, by success or error type",
    "`outcome` is `success` or the `type` of the error. A request that is refused as a whole "
    "counts as one image.",
    values=OUTCOMES,
)
TOP_CLASSES = _counter(
    "classifier_top_class_total",
    (*MODEL, "class_id", "class"),
    "images, by their top-1 class",
    "It shows when clients begin to send other images. There is one series for each class that "
    "was found; they are handed over every 15 s.",
    slow=True,
)
CACHE_LOOKUPS = _counter(
    "classifier_cache_lookups_total",
    (*MODEL, "result"),
    "images looked up in the result cache, by hit or miss",
    "0 without a cache. A hit in either counts, the worker's own and the shared one.",
    values=("hit", "miss"),
)
SHARED_LOOKUPS = _counter(
    "classifier_shared_cache_lookups_total",
    (*MODEL, "result"),
    "images looked up in the shared cache, by result",
    "`error`: Redis gave no answer within 4 ms, or an error. `skipped`: it was not asked, because "
    "it failed before, or has not yet answered the last question. Neither fails a request. 0 "
    "without `CLASSIFIER_CACHE_URL`.",
    values=("hit", "miss", "error", "skipped"),
)
SHARED_WRITES = _counter(
    "classifier_shared_cache_writes_total",
    (*MODEL, "result"),
    "results for the shared cache, by what became of them",
    "`dropped`: too many waited to be written, or Redis failed before. `error`: Redis refused it, "
    "such as a full one without eviction.",
    values=("written", "error", "dropped"),
)
SHARED_SECONDS = _histogram(
    "classifier_shared_cache_seconds",
    MODEL,
    "seconds that a batch waited for the shared cache",
    bounds=(0.00025, 0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.01),
)
STAGE = _histogram(
    "classifier_stage_seconds",
    (*MODEL, "stage"),
    "seconds that a request spent in a stage",
    "`queue`: from the gateway to the worker, if the request has `X-Request-Start` (see below). "
    "`preprocess`: reading the request, decoding, resizing. `inference`: the forward passes of "
    "the whole batch. `postprocess`: sorting and writing the answer. `total`: the whole batch in "
    "the worker. `response`: `queue` and `total` together, which is what a client waits for.",
    values=STAGES,
    bounds=(  # fine around the times of models on CPU and GPU, coarse for those of queues
        *(0.001, 0.002, 0.003, 0.005, 0.0075),
        *(0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
        *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
        *(1, 2, 5, 10, 30),
    ),
)
BATCH = _histogram(
    "classifier_batch_requests",
    MODEL,
    "requests that shared a batch",
    bounds=(1, 2, 4, 8, 16, 32, 64, 128),
)
IMAGE_BYTES = _histogram(
    "classifier_image_bytes",
    MODEL,
    "bytes of an encoded image",
    "Images that could not be decoded are included, and those that came as pixels (V2) are not.",
    bounds=(10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000),
)
IMAGE_PIXELS = _histogram(
    "classifier_image_pixels",
    MODEL,
    "pixels of an image, width x height",
    "Images whose size is not known are left out.",
    bounds=(100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000),
)
CONFIDENCE = _histogram(
    "classifier_top_confidence_ratio",
    MODEL,
    "probability of the top-1 class of an image, 0 to 1",
    "If it falls over days, the images no longer look like those that the model was trained on.",
    bounds=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1),
)
DRIFT = _counter(
    "classifier_drift_images_total",
    (*MODEL, "signal", "bin"),
    "images, by a signal of theirs and the bin that its value is in",
    "Of archives made with `--calibrate`. `signal` is `confidence`, `class` (the index of the "
    "top-1 class), `brightness` (the mean level of the model's input), `size` (pixels) or "
    "`distance` (from the images of `--calibrate`; of one image a second at most); `bin` is the "
    "upper bound of the values. Brightness and distance are not known of cached images and of "
    "those that the GPU decoded. Handed over every 15 s. See [Drift](trust.md#drift).",
    slow=True,
)
DRIFT_REFERENCE = _gauge(
    "classifier_drift_reference_ratio",
    (*MODEL, "signal", "bin"),
    "share of the images of --calibrate in a bin, 0 to 1",
)
DRIFT_REFERENCE_IMAGES = _gauge(
    "classifier_drift_reference_images", MODEL, "images of --calibrate that are compared with"
)
MODEL_INFO = _gauge(
    "classifier_model_info",
    (*MODEL, "architecture", "weights", "trained", "engine", "precision", "device"),
    "always 1; the labels say which model is served",
    "`trained` is `true` or `false`.",
)
BUILD_INFO = _gauge(
    "classifier_build_info",
    (*MODEL, "archive", "torchserve", "torch", "openvino", "python"),
    "always 1; the labels say which software serves it",
    "`archive` is the start of the digest of all that the archive was made from.",
)
STARTS = _counter(
    "classifier_worker_starts_total",
    WORKER,
    "starts of a worker, including the first",
    "Each one after the first is a restart. A start is counted before the model is loaded, so "
    "failing starts are included.",
)
HUNG = _counter(
    "classifier_worker_hung_total",
    WORKER,
    "workers that hung and were ended before this one's start",
    "The launcher kills a worker that shows no sign of life (`worker_hung` in the log), and one "
    "whose batch makes no progress ends itself (`worker_stuck`); the worker that starts next "
    "counts it.",
)
STARTUP = _gauge(
    "classifier_worker_startup_seconds",
    WORKER,
    "seconds from the start of a worker's process until it was ready",
    "Imports, loading the model and the warm-up are included. 0 while it starts, and for good if "
    "it has failed to.",
)
WARM_UP = _gauge(
    "classifier_worker_warmup_seconds", WORKER, "seconds that the warm-up of a worker took"
)
CERTIFICATE_ERROR = _gauge(
    "classifier_certificate_error_ratio",
    WORKER,
    "error of a worker's logits for the golden images, as a share of the reference's",
    "See [Trust](trust.md#certificate). The precision is a label of `classifier_model_info`. "
    "Archives without golden images have none of these.",
)
CERTIFICATE_AGREEMENT = _gauge(
    "classifier_certificate_agreement_ratio",
    WORKER,
    "share of the golden images with the reference's top-1 class, 0 to 1",
)
CERTIFICATE_DECODE = _gauge(
    "classifier_certificate_decode_levels",
    WORKER,
    "levels of 255 by which a golden image's pixels differ from the reference's, mean, the largest",
)
CERTIFICATE_SECONDS = _gauge(
    "classifier_certificate_seconds",
    WORKER,
    "seconds that a worker took at its start to classify the golden images",
)
BUSY = _counter(
    "classifier_worker_busy_seconds_total",
    WORKER,
    "seconds that a worker spent on batches",
    "Its rate is the share of time in which the worker is busy.",
)
CPU = _counter(
    "classifier_worker_cpu_seconds_total",
    WORKER,
    "seconds of CPU time that a worker used, in all its threads",
)
MEMORY = _gauge(
    "classifier_worker_resident_memory_bytes", WORKER, "bytes of resident memory of a worker"
)
LAST_FLUSH = _gauge(
    "classifier_worker_last_flush_timestamp_seconds",
    WORKER,
    "seconds since 1970 when a worker last handed its metrics over",
    "Each worker does so every five seconds.",
)
_gauge(
    MEMORY_USED,
    GPU,
    "bytes of a GPU's memory in use, by any process",
    "It is read every 5 s from each GPU that has a worker. `gpu` is `0` for `cuda:0` in answers.",
)
_gauge(MEMORY_TOTAL, GPU, "bytes of memory that a GPU has")
_gauge(
    UTILIZATION, GPU, "share of time in which a GPU was computing, 0 to 1", "A MIG device has none."
)
