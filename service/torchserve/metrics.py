"""TorchServe's own metrics, as its frontend has to find them declared in metrics.yaml."""

from handler.metrics import Family

_MODEL = ("model_name", "model_version", "hostname")
_HOST = ("Level", "Hostname")
_GPU = ("Level", "DeviceId", "Hostname")
_ANSWERS = (
    "on all of TorchServe's ports, scaling and health checks included; not there before the first"
)

METRICS = {
    "Requests2XX": Family(
        "counter", _HOST, "Count", f"answers with a status of 200 to 299, {_ANSWERS}"
    ),
    "Requests4XX": Family("counter", _HOST, "Count", "the same, 400 to 499"),
    "Requests5XX": Family("counter", _HOST, "Count", "the same, 500 to 599"),
    "ts_inference_requests_total": Family(
        "counter",
        _MODEL,
        "Count",
        "prediction requests that arrived, including those refused with 503",
    ),
    "ts_inference_latency_microseconds": Family(
        "counter", _MODEL, "Microseconds", "sum of the times from arrival to answer"
    ),
    "ts_queue_latency_microseconds": Family(
        "counter",
        _MODEL,
        "Microseconds",
        "sum of the times in the queue; its rate / 10⁶ is the average number of requests waiting",
    ),
    # TorchServe looks each gauge up by its name. Their values are the last ones seen, which nothing
    # here uses.
    "QueueTime": Family("gauge", _HOST, "Milliseconds"),
    "WorkerThreadTime": Family("gauge", _HOST, "Milliseconds"),
    "WorkerLoadTime": Family("gauge", ("WorkerName", *_HOST), "Milliseconds"),
    "CPUUtilization": Family("gauge", _HOST, "Percent"),
    "MemoryUsed": Family("gauge", _HOST, "Megabytes"),
    "MemoryAvailable": Family("gauge", _HOST, "Megabytes"),
    "MemoryUtilization": Family("gauge", _HOST, "Percent"),
    "DiskUsage": Family("gauge", _HOST, "Gigabytes"),
    "DiskUtilization": Family("gauge", _HOST, "Percent"),
    "DiskAvailable": Family("gauge", _HOST, "Gigabytes"),
    "GPUMemoryUtilization": Family("gauge", _GPU, "Percent"),
    "GPUMemoryUsed": Family("gauge", _GPU, "Megabytes"),
    "GPUUtilization": Family("gauge", _GPU, "Percent"),
}
