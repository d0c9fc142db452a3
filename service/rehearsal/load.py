"""An open-loop load on the gateways, and the account of every request."""

import asyncio
import json
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import aiohttp

from service.chaos.colours import LABELS, encoded
from service.load.answers import Expectations
from service.load.generator import REFUSALS, TIMEOUT_SECONDS, Generator, Reply
from service.load.images import ImageRequest
from service.load.measurement import Sample, percentile

OBJECTIVE_SECONDS = 0.5  # that of deploy/monitoring/alerts.yml, for 99 of 100 requests
WINDOW_SECONDS = 10.0  # for which the objective is held or not


@dataclass(frozen=True, kw_only=True)
class Account:
    """What became of requests: each is right, refused or failed."""

    seconds: float
    sent: int
    right: int  # answered with the image's own class
    refused: Mapping[str, int]  # by status and message
    failed: Mapping[str, int]  # by kind: another status, a wrong answer, or none
    p50_ms: float | None  # since a request was due, of right answers
    p99_ms: float | None
    held: float  # share of the time in which p99 was within the objective

    def unexplained(self) -> int:
        """Failures and refusals, but those by a limit that the manifests set (429)."""
        limited = sum(number for why, number in self.refused.items() if why.startswith("429 "))
        return self.sent - self.right - limited


def account(due: Sequence[Sample], refused: Mapping[str, int]) -> Account:
    """Of requests in the order in which they were due; `refused` says why some were."""
    times = [1000 * (sample.ended - sample.due) for sample in due if sample.outcome == "ok"]
    windows: dict[int, list[float]] = {}
    for sample in due:
        late = sample.ended - sample.due if sample.outcome == "ok" else math.inf
        windows.setdefault(int((sample.due - due[0].due) / WINDOW_SECONDS), []).append(late)
    held = [(percentile(window, 99) or 0) <= OBJECTIVE_SECONDS for window in windows.values()]
    return Account(
        seconds=round(due[-1].due - due[0].due, 1),
        sent=len(due),
        right=len(times),
        refused=dict(refused),
        failed=dict(Counter(s.outcome for s in due if s.outcome not in ("ok", "refused"))),
        p50_ms=percentile(times, 50),
        p99_ms=percentile(times, 99),
        held=sum(held) / len(held),
    )


class Traffic:
    """Clients in a thread of their own, from the begin to the end of a context."""

    def __init__(self, entrances: Callable[[str], Sequence[str]], rate: Callable[[float], float]):
        """`rate` is requests a second, so many seconds after the begin."""
        self._entrances = entrances
        self._rate = rate
        self._ended = threading.Event()
        self._rng = random.Random(0)  # noqa: S311 no secret
        self._refused = Counter[str]()
        images = [ImageRequest(label, encoded(label)) for label in LABELS]
        own = Expectations({label: label for label in LABELS})
        self._generator = Generator(self._post, cycle(images), own)
        self._thread = threading.Thread(target=asyncio.run, args=[self._run()], name="traffic")

    def account(self) -> Account:
        return account(self._generator.samples, self._refused)

    def __enter__(self) -> "Traffic":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Every request is waited for, for no longer than its client would wait."""
        self._ended.set()
        self._thread.join()

    async def _run(self) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self._session:
            await self._generator.send_at(self._times())

    def _times(self) -> Iterator[float]:
        """Poisson arrivals: those of many clients who know nothing of each other."""
        begin = due = time.perf_counter()
        while not self._ended.is_set():
            due += self._rng.expovariate(self._rate(due - begin))
            yield due

    async def _post(self, image: ImageRequest) -> Reply:
        entrances = self._entrances("/predict")
        if not entrances:
            raise ConnectionError("no gateway is ready")
        url = self._rng.choice(entrances)
        headers = {"Content-Type": image.content_type}
        async with self._session.post(url, data=image.body, headers=headers) as response:
            content = await response.read()
        if response.status in REFUSALS:
            self._refused[f"{response.status} {json.loads(content)['message']}"] += 1
        return response.status, response.headers, content
