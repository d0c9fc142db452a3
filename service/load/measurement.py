"""The figures of a load on a server, from what became of each request.

Latencies are of the requests due within the measured seconds, however late they were answered;
throughput counts the good answers that came within them. A percentile is by nearest rank: the
smallest latency seen that at least so many percent of the requests did not exceed.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Load:
    """How a server is loaded: `concurrency` clients, or `rate` requests a second."""

    seconds: float
    warmup_seconds: float = 0.0
    concurrency: int = 0
    rate: float = 0.0


@dataclass
class Sample:
    """What became of one request; times are those of perf_counter."""

    due: float
    started: float
    ended: float = math.inf
    outcome: str = "unanswered"  # "ok", "refused", or the kind of failure
    sent: int = 0
    received: int = 0
    cached: bool = False


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One load on one server. `refused` are 503s and 429s, and are not among `failed`."""

    concurrency: int
    rate: float
    seconds: float
    requests: int
    ok: int
    refused: int
    failed: int
    failures: dict[str, int]
    cached: int
    throughput_rps: float
    mean_ms: float | None  # of good answers; None if there was none
    p50_ms: float | None
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    refused_p50_ms: float | None
    refused_p99_ms: float | None
    sent_bytes: int
    received_bytes: int
    start_lag_p99_ms: float | None  # how late the generator itself sent what was due
    generator_cpu_percent: float  # of one core


def percentile(values: Sequence[float], percent: float) -> float | None:
    """By nearest rank; None of no values."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def summarise(
    samples: Sequence[Sample], begin: float, end: float, load: Load, cpu_percent: float
) -> Measurement:
    """The figures of the requests due from `begin` to `end`."""
    due = [sample for sample in samples if begin <= sample.due < end]
    answered = sum(s.outcome == "ok" and begin <= s.ended < end for s in samples)
    good = [1000 * (s.ended - s.due) for s in due if s.outcome == "ok"]
    refused = [1000 * (s.ended - s.due) for s in due if s.outcome == "refused"]
    failures = Counter(s.outcome for s in due if s.outcome not in ("ok", "refused"))
    lags = [1000 * (s.started - s.due) for s in due]
    return Measurement(
        concurrency=load.concurrency,
        rate=load.rate,
        seconds=load.seconds,
        requests=len(due),
        ok=len(good),
        refused=len(refused),
        failed=failures.total(),
        failures=dict(failures),
        cached=sum(s.cached for s in due),
        throughput_rps=answered / (end - begin),
        mean_ms=sum(good) / len(good) if good else None,
        p50_ms=percentile(good, 50),
        p90_ms=percentile(good, 90),
        p95_ms=percentile(good, 95),
        p99_ms=percentile(good, 99),
        refused_p50_ms=percentile(refused, 50),
        refused_p99_ms=percentile(refused, 99),
        sent_bytes=sum(s.sent for s in due),
        received_bytes=sum(s.received for s in due),
        start_lag_p99_ms=percentile(lags, 99),
        generator_cpu_percent=cpu_percent,
    )
