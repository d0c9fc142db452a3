"""What a request's headers say about where it comes from and how long it waited."""

import re
from collections.abc import Mapping
from typing import Any

MAX_QUEUE_SECONDS = 3600  # more than this is a wrong clock, not a queue

# https://www.w3.org/TR/trace-context/#traceparent-header: version, trace, parent, flags
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)
_REQUEST_START = re.compile(r"t=(\d{1,12}(?:\.\d{1,9})?)", re.ASCII)


def read_traceparent(headers: Mapping[str, Any]) -> str | None:
    """The client's `traceparent`, or None if there is none that the standard allows."""
    text = str(headers.get("traceparent", ""))
    return text if _TRACEPARENT.fullmatch(text) else None


def read_queue_seconds(headers: Mapping[str, Any], arrival: float) -> float | None:
    """Seconds from `X-Request-Start: t=<unix seconds>`, which a gateway sets, to `arrival`.

    None without the header, or if its time is impossible. TorchServe itself tells a handler
    nothing about its queue.
    """
    match = _REQUEST_START.fullmatch(str(headers.get("x-request-start", "")))
    if match is None:
        return None
    waited = arrival - float(match[1])
    return waited if 0 <= waited <= MAX_QUEUE_SECONDS else None


def is_probe(headers: Mapping[str, Any]) -> bool:
    """Whether the request is a health check (service/gateway/watch.py).

    These are counted apart, and never answered from the cache, because they ask whether the model
    runs.
    """
    return headers.get("x-probe") == "1"
