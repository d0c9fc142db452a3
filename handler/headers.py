"""What a request's headers say: where it comes from, how long it waited and how long it may."""

import re
from collections.abc import Mapping
from math import inf
from typing import Any

from handler.errors import MalformedRequest

MAX_QUEUE_SECONDS = 3600  # more than this is a wrong clock, not a queue

# https://www.w3.org/TR/trace-context/#traceparent-header: version, trace, parent, flags
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)
_SECONDS = re.compile(r"\d{1,9}(\.\d{1,9})?", re.ASCII)
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


def read_deadline(headers: Mapping[str, Any], arrival: float) -> float:
    """The Unix time from which on nobody waits for the answer; infinite if no header says.

    `X-Request-Timeout: <seconds>` counts from X-Request-Start, or, if there is none, from
    `arrival` at the worker. Raises MalformedRequest.
    """
    seconds = str(headers.get("x-request-timeout", "")).strip()  # of more blanks than float() takes
    if not seconds:
        return inf
    if not _SECONDS.fullmatch(seconds):
        raise MalformedRequest("X-Request-Timeout must be a number of seconds, such as 2.5")
    return arrival - (read_queue_seconds(headers, arrival) or 0) + float(seconds)


def is_probe(headers: Mapping[str, Any]) -> bool:
    """Whether the request is a health check (service/gateway/watch.py).

    These are counted apart, and never answered from the cache, because they ask whether the model
    runs.
    """
    return headers.get("x-probe") == "1"


def wants_best_classes(headers: Mapping[str, Any]) -> bool:
    """Whether the gateway asks for the best classes in a header, so that feedback can judge them.

    The gateway passes neither this header of a client on, nor the answer's header to a client.
    """
    return headers.get("x-best-classes") == "1"
