"""A load from several processes, for servers that are faster than one process can ask.

Each has its share of the clients. What became of their requests is put together as if one process
had sent them all: their clocks are the same one.
"""

import asyncio
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from service.load.answers import Expectations
from service.load.generator import Generator, cpu_percent
from service.load.images import ImageRequest, unique_requests
from service.load.measurement import Load, Measurement, Sample, summarise
from service.load.wire import Wire

START_SECONDS = 30  # for the processes to import what they need
LEAD_SECONDS = 0.3  # between the call and the first request: all begin together
TIMEOUT_SECONDS = 15  # of a request


@dataclass(frozen=True)
class Share:
    """What one process does, at times of perf_counter."""

    url: str
    images: Sequence[ImageRequest]
    per_request: int
    classes: bool
    clients: int
    start: float
    begin: float
    end: float


class Crew:
    """Processes that send images to a server, none of them twice; a context manager."""

    def __init__(self, processes: int) -> None:
        # One executor each, because one for all may give a process two shares. An executor says
        # so (BrokenProcessPool) if its process has died, where a multiprocessing.Pool would wait.
        context = multiprocessing.get_context("spawn")
        self._stack = ExitStack()
        self._executors = [
            self._stack.enter_context(ProcessPoolExecutor(1, context)) for _ in range(processes)
        ]

    def __enter__(self) -> "Crew":
        # Any function of this module: to find it, a process imports what it needs for its share.
        for started in [executor.submit(share_out, 1, 1) for executor in self._executors]:
            started.result(START_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def measure(
        self,
        url: str,
        images: Sequence[ImageRequest],
        load: Load,
        *,
        per_request: int = 1,
        classes: bool = True,
    ) -> Measurement:
        """A closed loop; `per_request` images in a request, and `classes` as for Expectations.

        `generator_cpu_percent` is that of the busiest process. Raises BrokenProcessPool or
        TimeoutError if a process has died or hangs.
        """
        start = time.perf_counter() + LEAD_SECONDS
        begin = start + load.warmup_seconds
        end = begin + load.seconds
        counts = share_out(load.concurrency, len(self._executors))
        futures = [
            executor.submit(
                work, Share(url, images, per_request, classes, count, start, begin, end)
            )
            for executor, count in zip(self._executors, counts, strict=False)
        ]
        patience = end - time.perf_counter() + 2 * TIMEOUT_SECONDS
        results = [future.result(patience) for future in futures]
        samples = [sample for found, _ in results for sample in found]
        return summarise(samples, begin, end, load, max(cpu for _, cpu in results))


def share_out(clients: int, processes: int) -> list[int]:
    """Clients for each process, as even as can be, and only for processes that get any."""
    most = min(clients, processes)
    return [clients // most + (number < clients % most) for number in range(most)]


def work(share: Share) -> tuple[list[Sample], float]:
    """Samples and CPU percent of one process."""
    return asyncio.run(_work(share))


async def _work(share: Share) -> tuple[list[Sample], float]:
    wire = Wire(share.url, TIMEOUT_SECONDS)
    requests = unique_requests(share.images, share.per_request)
    generator = Generator(wire.post, requests, Expectations(classes=share.classes))
    cpu = asyncio.create_task(cpu_percent(share.begin, share.end))
    await asyncio.sleep(share.start - time.perf_counter())
    await generator.closed_loop(share.clients, share.end)
    wire.close()
    return generator.samples, await cpu
