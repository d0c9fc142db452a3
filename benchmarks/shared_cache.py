"""What a hit in the shared cache costs beside a prediction, and what a Redis that hangs costs.

Each of the two is a pair of loads on one running server that take turns in short slices: hits and
predictions, which a health check asks for; predictions of new images while Redis runs and while it
is stopped (SIGSTOP).
"""

import asyncio
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.alone import chosen_precision
from benchmarks.conditions import conditions
from benchmarks.environments import SetupFailed
from benchmarks.images import load_rgb
from benchmarks.pairs import measure_pair, without_metrics
from benchmarks.servers import Started, StartFailed, make_parser, make_servers, say
from benchmarks.subjects import ROOT, ours
from service.load.generator import TIMEOUT_SECONDS, Generator
from service.load.images import ImageRequest, unique_requests
from service.load.measurement import Load, Sample, percentile
from service.load.processes import Server, free_base_port, running
from service.load.wire import Wire

FILE = "shared_cache.json"
HIT_SHARE = 0.2  # of the CPU time and of the p50 of a prediction: a hit's, at most
MIN_HITS = 0.9  # of the answers that should be hits: a busy machine may take 4 ms for one
HANG_MS = 10.0  # by which p99 may rise
HEAL_SECONDS = 2.0  # workers look once a second whether Redis answers again
SETTLE_SECONDS = 0.5  # until what was classified is written
ORDER = (False, True, True, False) * 2  # whether Redis is stopped


@contextmanager
def redis_server() -> Iterator[tuple[str, Server]]:
    """A Redis on loopback: its URL, and the process. Raises SetupFailed."""
    command = shutil.which("redis-server")
    if command is None:
        raise SetupFailed("redis-server is not installed")
    with TemporaryDirectory(prefix="bench-redis-") as folder:
        port = str(free_base_port())
        options = ["--port", port, "--bind", "127.0.0.1", "--save", ""]
        with running([command, *options], {}, Path(folder)) as server:
            try:
                yield f"redis://127.0.0.1:{port}", server
            finally:
                server.process.send_signal(signal.SIGCONT)


def measure_hits(target: Started, images: Sequence[ImageRequest], seconds: float) -> dict[str, Any]:
    """CPU time a request and p50 of hits (`with`) and predictions (`without`), one client."""
    load = Load(concurrency=1, seconds=seconds)
    target.measure(images, load)
    time.sleep(SETTLE_SECONDS)
    run = target.measure(images, load)
    if run.cached < MIN_HITS * run.requests:
        raise StartFailed(f"only {run.cached} of {run.requests} answers were hits")
    return measure_pair(target, without_metrics(target), images, 1, seconds)


def measure_hang(
    target: Started, images: Sequence[ImageRequest], redis: Server, seconds: float
) -> dict[str, Any]:
    """p99 and failures of predictions while Redis runs and while it is stopped, one client."""
    samples: dict[bool, list[Sample]] = {False: [], True: []}
    for stopped in ORDER:
        redis.process.send_signal(signal.SIGSTOP if stopped else signal.SIGCONT)
        if not stopped:
            time.sleep(HEAL_SECONDS)
        samples[stopped] += asyncio.run(_send(target, images, seconds))
    redis.process.send_signal(signal.SIGCONT)
    return {"running": _figures(samples[False]), "stopped": _figures(samples[True])}


async def _send(target: Started, images: Sequence[ImageRequest], seconds: float) -> list[Sample]:
    wire = Wire(target.url, TIMEOUT_SECONDS)
    generator = Generator(wire.post, unique_requests(images), target.expectations)
    await generator.closed_loop(1, time.perf_counter() + seconds)
    wire.close()
    return generator.samples


def _figures(samples: Sequence[Sample]) -> dict[str, Any]:
    good = [1000 * (sample.ended - sample.due) for sample in samples if sample.outcome == "ok"]
    figures = {f"p{rank}_ms": percentile(good, rank) for rank in (50, 99)}
    cached = sum(sample.cached for sample in samples)
    failed = len(samples) - len(good)
    return {"requests": len(samples), "cached": cached, "failed": failed, **figures}


def verdicts(hits: dict[str, Any], hang: dict[str, Any]) -> dict[str, bool]:
    """Whether each promise was kept."""
    hit, prediction = hits["with"], hits["without"]
    running, stopped = hang["running"], hang["stopped"]
    return {
        "a hit takes at most a fifth of a prediction's CPU time": (
            hit["cpu_ms"] <= HIT_SHARE * prediction["cpu_ms"]
        ),
        "a hit takes at most a fifth of a prediction's p50": (
            hit["p50_ms"] <= HIT_SHARE * prediction["p50_ms"]
        ),
        "p99 rises by less than 10 ms while Redis hangs": (
            stopped["p99_ms"] - running["p99_ms"] < HANG_MS
        ),
        "no request fails": (
            not hit["failed"] + prediction["failed"] + running["failed"] + stopped["failed"]
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    description = "Measure hits in the shared cache, and a Redis that hangs."
    parser = make_parser("shared_cache", description, "resnet50", ROOT / "benchmarks")
    args = parser.parse_args(argv)
    precision = chosen_precision()
    try:
        with (
            redis_server() as (url, redis),
            make_servers(args, device="cpu", precision=precision, workers=1) as servers,
        ):
            images = load_rgb(args.images)
            subject = ours(servers.model, precision, servers.model_options(precision))
            subject = replace(subject, environ={"CLASSIFIER_CACHE_URL": url})
            servers.package(precision)
            with servers.started(subject, Path(sys.executable), images[0], []) as target:
                hits = measure_hits(target, images, args.seconds)
                say(f"hits (with) and predictions (without): {json.dumps(hits)}")
                hang = measure_hang(target, images, redis, args.seconds)
                say(f"predictions, Redis running and stopped: {json.dumps(hang)}")
            found = {"hits": hits, "hang": hang, "verdicts": verdicts(hits, hang)}
            data = {"conditions": conditions(servers, images), "seconds": args.seconds} | found
    except (SetupFailed, StartFailed) as exc:
        print(f"failed: {exc}", file=sys.stderr)
        return 1
    (args.out / FILE).write_text(json.dumps(data, indent=1) + "\n")
    for promise, kept in found["verdicts"].items():
        print(f"{promise}: {kept}")
    print(json.dumps(data))
    return 0 if all(found["verdicts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
