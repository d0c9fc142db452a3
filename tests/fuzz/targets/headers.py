"""Headers of requests: traceparent, X-Request-Start, X-Probe, X-Request-Timeout."""

from math import inf

from handler.errors import MalformedRequest
from handler.headers import (
    MAX_QUEUE_SECONDS,
    is_probe,
    read_deadline,
    read_queue_seconds,
    read_traceparent,
)
from tests.fuzz.target import Target

NOW = 1_700_000_000.5
TRACE = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def check(data: bytes) -> None:
    names = ("traceparent", "x-request-start", "x-probe", "x-request-timeout")
    texts = [part.decode("latin-1") for part in data.split(b"\n", 3)]
    headers = dict(zip(names, texts, strict=False))
    trace = read_traceparent(headers)
    if trace is not None:
        assert trace == headers["traceparent"]
        version, trace_id, parent, flags = trace.split("-")
        assert [len(part) for part in (version, trace_id, parent, flags)] == [2, 32, 16, 2]
        assert version != "ff"
        assert int(trace_id, 16)
        assert int(parent, 16)
        assert trace == trace.lower()
    waited = read_queue_seconds(headers, NOW)
    if waited is not None:
        assert 0 <= waited <= MAX_QUEUE_SECONDS
        assert waited == NOW - float(headers["x-request-start"].removeprefix("t="))
    try:
        deadline = read_deadline(headers, NOW)
    except MalformedRequest:
        deadline = inf
    assert deadline >= NOW - (waited or 0)
    assert is_probe(headers) == (headers.get("x-probe") == "1")


def seeds() -> list[bytes]:
    return [
        TRACE + b"\nt=1700000000.123\n1",
        TRACE + b"\nt=1699999999\n0",
        b"\nt=1\n\n2.5",
        b"\nt=9e9",
    ]


TARGET = Target(check=check, seeds=seeds, tokens=(b"\n", b"t=", b"00-", b"ff-", TRACE, b"17"))
