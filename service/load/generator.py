"""Sends images to a running server and checks every answer.

Closed loop (`concurrency`): so many clients, each sending its next request when it has its answer.
Open loop (`rate`): requests by the clock, whatever became of those before. Latency counts from the
moment a request was due, so a server that stalls cannot hide the requests that waited for it.
"""

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle

import aiohttp

from service.load.answers import Expectations, read_predictions, without_tensor_header
from service.load.images import ImageRequest
from service.load.measurement import Load, Measurement, Sample, summarise

TIMEOUT_SECONDS = 60
REFUSALS = (503, 429)  # TorchServe's, whose queue is full, and the gateway's

Reply = tuple[int, Mapping[str, str], bytes]  # status, headers, content
Post = Callable[[ImageRequest], Awaitable[Reply]]


async def measure(
    url: str,
    images: Sequence[ImageRequest],
    load: Load,
    *,
    headers: Mapping[str, str] | None = None,
    expectations: Expectations | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
    mark: Callable[[], object] = lambda: None,
) -> Measurement:
    """Warm up and measure without a pause in between.

    `mark` is called at the begin and at the end of the measured seconds.
    """
    async with _session(headers, timeout_seconds) as session:
        post = poster(session, url)
        generator = Generator(post, cycle(images), expectations or Expectations())
        start = time.perf_counter()
        begin, end = start + load.warmup_seconds, start + load.warmup_seconds + load.seconds
        cpu = asyncio.create_task(cpu_percent(begin, end, mark))
        if load.rate:
            await generator.open_loop(load.rate, start, end)
        else:
            await generator.closed_loop(load.concurrency, end)
        return summarise(generator.samples, begin, end, load, await cpu)


async def send_once(
    url: str,
    images: Sequence[ImageRequest],
    *,
    clients: int = 1,
    headers: Mapping[str, str] | None = None,
    expectations: Expectations | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> list[Sample]:
    """Send each image once; what became of each, in the order in which they were sent."""
    async with _session(headers, timeout_seconds) as session:
        generator = Generator(poster(session, url), images, expectations or Expectations())
        await generator.closed_loop(clients, math.inf)
        return generator.samples


async def try_one(url: str, image: ImageRequest, headers: Mapping[str, str] | None = None) -> Reply:
    """The reply to one image. Raises aiohttp.ClientError, TimeoutError and OSError."""
    async with _session(headers, TIMEOUT_SECONDS) as session:
        return await poster(session, url)(image)


def _session(headers: Mapping[str, str] | None, timeout_seconds: float) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),  # as many connections as requests at once
        timeout=aiohttp.ClientTimeout(total=timeout_seconds),
        headers=headers,
        trust_env=False,  # no proxy of the environment
    )


def poster(session: aiohttp.ClientSession, url: str) -> Post:
    """How a Generator sends an image with aiohttp."""

    async def post(image: ImageRequest) -> Reply:
        headers = {"Content-Type": image.content_type}
        async with session.post(
            url,
            data=image.body,
            headers=headers,
            allow_redirects=False,  # a key in the session's headers is for this server alone
        ) as response:
            return response.status, response.headers, await response.read()

    return post


class Generator:
    """Sends images to one URL, one after the other, and keeps a Sample of each request."""

    def __init__(
        self, post: Post, images: Iterable[ImageRequest], expectations: Expectations
    ) -> None:
        self._post = post
        self._images = iter(images)
        self._expectations = expectations
        self.samples: list[Sample] = []

    async def closed_loop(self, clients: int, end: float) -> None:
        """Until `end`, a time of perf_counter, or until no image is left."""

        async def client() -> None:
            while (now := time.perf_counter()) < end and (image := next(self._images, None)):
                await self._request(image, now)

        await asyncio.gather(*(client() for _ in range(clients)))

    async def open_loop(self, rate: float, begin: float, end: float) -> None:
        await self.send_at(due_times(begin, end, rate))

    async def send_at(self, times: Iterable[float]) -> None:
        """One request at each of some times of perf_counter, until no image is left."""
        tasks: set[asyncio.Task[None]] = set()
        for due, image in zip(times, self._images, strict=False):
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(self._request(image, due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def _request(self, image: ImageRequest, due: float) -> None:
        sample = Sample(due, time.perf_counter(), sent=len(image.body))
        self.samples.append(sample)
        try:
            status, headers, content = await self._post(image)
            sample.received = len(content)
            content = without_tensor_header(content, headers)
            sample.outcome = self._judge(image.name, status, content, sample)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as exc:
            sample.outcome = type(exc).__name__
        sample.ended = time.perf_counter()

    def _judge(self, name: str, status: int, content: bytes, sample: Sample) -> str:
        if status in REFUSALS:
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


def due_times(begin: float, end: float, rate: float) -> Iterator[float]:
    """When the requests of an open loop are due, evenly from `begin` until before `end`."""
    # Multiplied, not added up: the error of a sum would grow.
    return (begin + index / rate for index in range(math.ceil((end - begin) * rate)))


async def cpu_percent(begin: float, end: float, mark: Callable[[], object] = lambda: None) -> float:
    """CPU time of this process between two moments, in percent of one core; `mark` at each."""
    await asyncio.sleep(begin - time.perf_counter())
    mark()
    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.sleep(end - time.perf_counter())
    mark()
    return 100 * (time.process_time() - cpu) / (time.perf_counter() - wall)
