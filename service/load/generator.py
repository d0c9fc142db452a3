"""Load a running server, check every answer, and say how fast it was.

A table for people comes first; the last line is one JSON object.

Closed loop (--concurrency): so many clients, each sending its next request when it has its answer.
Open loop (--rate): requests by the clock, whatever became of those before. Latency counts from the
moment a request was due, so a server that stalls cannot hide the requests that waited for it.

Latencies are of the requests due within the measured seconds, however late they were answered;
throughput counts the good answers that came within them. A percentile is by nearest rank: the
smallest latency seen that at least so many percent of the requests did not exceed.
"""

import argparse
import asyncio
import json
import math
import os
import platform
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image

from handler.machine import available_cores, cpu_model
from service.options import number

SUFFIXES = (".jpg", ".jpeg")
DRAWN_IMAGES = 16
TIMEOUT_SECONDS = 60
NEAR_TIE = 0.95  # of the best confidence: batches of other sizes round differently
BOUNDARY = "benchmark-0c9f0f7a5d"
LIBRARIES = ("aiohttp", "pillow")


@dataclass(frozen=True)
class Picture:
    """An image as it goes over the wire."""

    name: str
    body: bytes
    content_type: str = "image/jpeg"


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
    """One load on one server. `refused` are 503s, and are not among `failed`."""

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
    mean_ms: float | None  # of good answers; None where there was none
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


class Expectations:
    """The top class of each image: as given, or as it was first answered."""

    def __init__(self, given: Mapping[str, str] | None = None) -> None:
        self.top_classes: dict[str, str] = dict(given or {})

    def problem(self, name: str, predictions: Sequence[tuple[str, float]]) -> str | None:
        """What is wrong with an answer, in a word; None for a good one."""
        if not predictions:
            return "NoPredictions"
        confidences = [confidence for _, confidence in predictions]
        if not all(0 <= confidence <= 1 for confidence in confidences):
            return "NoProbabilities"
        if confidences != sorted(confidences, reverse=True):
            return "Unsorted"
        expected = self.top_classes.setdefault(name, predictions[0][0])
        near = [label for label, p in predictions if p >= NEAR_TIE * confidences[0]]
        return None if expected in near else "WrongClass"


def read_predictions(document: Any) -> list[tuple[str, float]]:
    """Labels and confidences, best first, in the shapes that classifiers answer in.

    Ours: {"predictions": [{"class": …, "confidence": …}]}, or {"results": […]} of several images,
    where the first's are given, and none unless all were classified; TorchServe's image_classifier:
    {label: confidence}.
    """
    if isinstance(document, Mapping) and isinstance(document.get("results"), list):
        if document.get("status") != "success":
            return []
        document = document["results"][0]
    if isinstance(document, Mapping) and "predictions" in document:
        document = document["predictions"]
    try:
        if isinstance(document, Mapping):
            return [(str(label), float(confidence)) for label, confidence in document.items()]
        return [(str(entry["class"]), float(entry["confidence"])) for entry in document]
    except (LookupError, TypeError, ValueError):
        return []


def without_tensor_header(content: bytes, headers: Mapping[str, str]) -> bytes:
    """The text in an answer of Triton's binary protocol: one output, of one element.

    A JSON header, the length of the element in four bytes, and the element.
    """
    length = headers.get("Inference-Header-Content-Length")
    return content if length is None else content[int(length) + 4 :]


def percentile(values: Sequence[float], percent: float) -> float | None:
    """By nearest rank; None of no values."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def due_times(begin: float, end: float, rate: float) -> Iterator[float]:
    """When the requests of an open loop are due, evenly from `begin` until before `end`."""
    # Multiplied, not added up: the error of a sum would grow.
    return (begin + index / rate for index in range(math.ceil((end - begin) * rate)))


class Generator:
    """Sends pictures to one URL and keeps a Sample of each request."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        pictures: Sequence[Picture],
        expectations: Expectations,
    ) -> None:
        self._session = session
        self._url = url
        self._pictures = cycle(pictures)
        self._expectations = expectations
        self.samples: list[Sample] = []

    async def closed_loop(self, clients: int, end: float) -> None:
        async def client() -> None:
            while (now := time.perf_counter()) < end:
                await self._request(now)

        await asyncio.gather(*(client() for _ in range(clients)))

    async def open_loop(self, rate: float, begin: float, end: float) -> None:
        tasks: set[asyncio.Task[None]] = set()
        for due in due_times(begin, end, rate):
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(self._request(due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def _request(self, due: float) -> None:
        sample = Sample(due, time.perf_counter())
        self.samples.append(sample)
        picture = next(self._pictures)
        sample.sent = len(picture.body)
        try:
            async with self._session.post(
                self._url, data=picture.body, headers={"Content-Type": picture.content_type}
            ) as response:
                content = await response.read()
            sample.received = len(content)
            content = without_tensor_header(content, response.headers)
            sample.outcome = self._judge(picture.name, response.status, content, sample)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as exc:
            sample.outcome = type(exc).__name__
        sample.ended = time.perf_counter()

    def _judge(self, name: str, status: int, content: bytes, sample: Sample) -> str:
        if status == 503:
            return "refused"
        if status != 200:
            return f"HTTP {status}"
        try:
            document = json.loads(content)
        except ValueError:
            return "NoJSON"
        metadata = document.get("metadata") if isinstance(document, dict) else None
        sample.cached = isinstance(metadata, dict) and metadata.get("cached") is True
        return self._expectations.problem(name, read_predictions(document)) or "ok"


async def measure(
    url: str,
    pictures: Sequence[Picture],
    load: Load,
    *,
    headers: Mapping[str, str] | None = None,
    expectations: Expectations | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Measurement:
    """Warm up and measure without a pause in between."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),  # as many connections as requests at once
        timeout=aiohttp.ClientTimeout(total=timeout_seconds),
        headers=headers,
        trust_env=False,  # no proxy of the environment
    ) as session:
        generator = Generator(session, url, pictures, expectations or Expectations())
        start = time.perf_counter()
        begin, end = start + load.warmup_seconds, start + load.warmup_seconds + load.seconds
        cpu = asyncio.create_task(_cpu_percent(begin, end))
        if load.rate:
            await generator.open_loop(load.rate, start, end)
        else:
            await generator.closed_loop(load.concurrency, end)
        return summarise(generator.samples, begin, end, load, await cpu)


async def _cpu_percent(begin: float, end: float) -> float:
    """CPU time of this process between two moments, in percent of one core."""
    await asyncio.sleep(begin - time.perf_counter())
    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.sleep(end - time.perf_counter())
    return 100 * (time.process_time() - cpu) / (time.perf_counter() - wall)


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


def load_pictures(folder: Path | None, form: str = "raw", part: str = "file") -> list[Picture]:
    """The JPEGs of a folder, or ones drawn here, as bodies of the form "raw" or "multipart".

    Raises FileNotFoundError where the folder has none.
    """
    if folder is None:
        files = {f"drawn-{seed}.jpg": draw_jpeg(seed) for seed in range(DRAWN_IMAGES)}
    else:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise FileNotFoundError(f"{folder} has no {' or '.join(SUFFIXES)} files")
        files = {path.name: path.read_bytes() for path in paths}
    return [as_form(Picture(name, data), form, part) for name, data in files.items()]


def as_form(picture: Picture, form: str, part: str = "file") -> Picture:
    """A picture with its body in the form "raw" or "multipart"."""
    if form == "raw":
        return picture
    content_type = f"multipart/form-data; boundary={BOUNDARY}"
    return Picture(picture.name, _multipart(picture.body, part), content_type)


def _multipart(data: bytes, part: str) -> bytes:
    head = (
        f"--{BOUNDARY}\r\n"
        f'Content-Disposition: form-data; name="{part}"; filename="image.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    )
    return head.encode() + data + f"\r\n--{BOUNDARY}--\r\n".encode()


def draw_jpeg(seed: int) -> bytes:
    """About the size and bytes of a photograph in ImageNet; the same for the same seed."""
    rng = random.Random(seed)  # noqa: S311 a picture, not a secret
    size = (500 + rng.randint(-20, 20), 375 + rng.randint(-20, 20))
    picture = Image.new("RGB", size)
    for cells, share in ((4, 1.0), (16, 0.5), (64, 0.3), (256, 0.15)):  # coarse to fine
        noise = Image.frombytes("RGB", (cells, cells), rng.randbytes(cells * cells * 3))
        picture = Image.blend(picture, noise.resize(size, Image.Resampling.BICUBIC), share)
    file = BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def machine() -> dict[str, Any]:
    """What the figures depend on besides the server."""
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": available_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return facts
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")
    found = re.search(r"^flags\s*: (.+)", text, re.MULTILINE)
    facts["flags"] = [flag for flag in known if found and flag in found[1].split()]
    return facts


HEADINGS = ("load", "req/s", "p50 ms", "p90 ms", "p95 ms", "p99 ms", "refused", "failed", "own CPU")


def row(run: Measurement) -> str:
    """One line of the table."""
    load = f"{run.rate:g}/s" if run.rate else f"{run.concurrency} clients"
    times = (run.p50_ms, run.p90_ms, run.p95_ms, run.p99_ms)
    cells = [f"{value:.1f}" if value is not None else "-" for value in times]
    line = [load, f"{run.throughput_rps:.1f}", *cells, str(run.refused), str(run.failed)]
    text = "".join(f"{cell:>11}" for cell in [*line, f"{run.generator_cpu_percent:.0f}%"])
    for kind, count in run.failures.items():
        text += f"\n{'':11}{count} x {kind}"
    return text


def plot(runs: Sequence[Measurement], path: Path) -> None:
    """Throughput against latency, a point for each load."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in ("p50_ms", "p95_ms", "p99_ms"):
        points = [(r.throughput_rps, value) for r in runs if (value := getattr(r, name))]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name.removesuffix("_ms"))
    axes.set(xlabel="good answers a second", ylabel="latency, ms", ylim=(0, None), xlim=(0, None))
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./scripts/benchmark", description="Load a running server and check every answer."
    )
    parser.add_argument(
        "--url",
        default="http://127.0.0.1:8080",
        help="the server, or a whole URL with a path to send images to (%(default)s)",
    )
    parser.add_argument("--model", default="mobilenet_v2", help="where --url has no path")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="JPEGs to send (default: drawn here)"
    )
    parser.add_argument(
        "--concurrency",
        type=number(1, 10_000),
        nargs="+",
        metavar="N",
        help="closed loop of so many clients, one measurement each (default: 1 8 32)",
    )
    parser.add_argument(
        "--rate", type=_positive, nargs="+", metavar="R", help="open loop of R requests a second"
    )
    parser.add_argument("--seconds", type=_positive, default=10.0, help="measured (%(default)s)")
    parser.add_argument(
        "--warmup-seconds", type=_positive, default=2.0, help="before each (%(default)s)"
    )
    parser.add_argument("--form", choices=["raw", "multipart"], default="raw", help="(%(default)s)")
    parser.add_argument(
        "--header", action="append", default=[], metavar="'NAME: VALUE'", help="repeatable"
    )
    parser.add_argument(
        "--expect",
        type=Path,
        metavar="FILE",
        help="JSON object of file name to top class (default: as each image is answered first)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="throughput against latency")
    args = parser.parse_args(argv)
    if args.concurrency is None and args.rate is None:
        args.concurrency = [1, 8, 32]
    return args


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


@dataclass(frozen=True)
class Report:
    """The last line."""

    url: str
    form: str
    images: int
    image_bytes: int  # on the wire, on average
    machine: dict[str, Any]
    versions: dict[str, str]
    measurements: list[Measurement] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    base = args.url.rstrip("/")
    url = base if "/" in base.partition("://")[2] else f"{base}/predictions/{args.model}"
    try:
        headers = dict(re.split(r":\s*", header, maxsplit=1) for header in args.header)
        pictures = load_pictures(args.images, args.form)
        given = json.loads(args.expect.read_text("utf-8")) if args.expect else None
        expectations = Expectations(given)
    except (OSError, ValueError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    report = Report(
        url=url,
        form=args.form,
        images=len(pictures),
        image_bytes=sum(len(picture.body) for picture in pictures) // len(pictures),
        machine=machine(),
        versions={name: version(name) for name in LIBRARIES},
    )
    print("".join(f"{heading:>11}" for heading in HEADINGS), flush=True)
    times = {"seconds": args.seconds, "warmup_seconds": args.warmup_seconds}
    loads = [Load(concurrency=clients, **times) for clients in args.concurrency or ()]
    loads += [Load(rate=rate, **times) for rate in args.rate or ()]
    for load in loads:
        try:
            run = asyncio.run(
                measure(url, pictures, load, headers=headers, expectations=expectations)
            )
        except KeyboardInterrupt:
            return 130
        report.measurements.append(run)
        print(row(run), flush=True)
    if args.plot:
        plot(report.measurements, args.plot)
    print(json.dumps(asdict(report)))
    return 1 if any(run.failed or not run.ok for run in report.measurements) else 0
