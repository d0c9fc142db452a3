"""Jobs classified: a slice of one at a time, through the gateway and behind everybody else."""

import asyncio
import random
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlencode

import aiohttp
import orjson

from service.jobs import spool
from service.jobs.outside import NotFetched, Outside
from service.jobs.process import Config
from service.jobs.spool import Image, read_image, read_index
from service.jobs.store import Store

SLICE_SECONDS = 5.0  # then the next job has its turn
FULL = (429, 503)  # nobody is to blame: the image waits as long as the job may
TRIES = 5  # of an image at which the service fails
MAX_WAIT_SECONDS = 10.0
SLACK_SECONDS = 10  # until a gateway that does not keep its own limit in time is given up


class Postponed(Exception):
    """The image has no result yet; another slice will come to it."""


class Work:
    """What Dramatiq's messages set going; a context manager."""

    def __init__(self, store: Store, outside: Outside, config: Config) -> None:
        self._store = store
        self._outside = outside
        self._folder = Path(config.folder)
        self._settings = config.settings
        self._config = config
        self._places = asyncio.Semaphore(config.settings.jobs_concurrency)
        self.running: set[str] = set()
        self.stopping = asyncio.Event()

    async def __aenter__(self) -> "Work":
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(self._config.gateway, limit=0, keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(total=self._config.response_seconds + SLACK_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Authorization": f"Bearer {self._config.key}"},
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def advance(self, job_id: str) -> bool:
        """Classify images of a job for some seconds; whether it needs another slice.

        Raises redis.RedisError.
        """
        if job_id in self.running:
            return False  # its other message goes on with it
        self.running.add(job_id)
        try:
            return await self._advance(job_id)
        finally:
            self.running.discard(job_id)

    async def _advance(self, job_id: str) -> bool:
        job = await self._store.get(job_id)
        if not job or job["finished"]:
            return False
        try:
            images = read_index(self._folder, job_id)
        except (OSError, ValueError):
            await self._store.finish(job_id, "failed", "its images are gone from the disk")
            return False
        answered = await self._store.answered(job_id)
        left = iter([i for i in range(len(images)) if i not in answered])
        until = time.monotonic() + SLICE_SECONDS
        query = urlencode({name: job[name] for name in ("model", "version", "top_k") if job[name]})

        async def lane() -> None:
            while not self.stopping.is_set() and time.monotonic() < until:
                if (index := next(left, None)) is None or not await self._store.is_open(job_id):
                    return
                line, failed = await self._answer(job_id, index, images[index], query, until)
                await self._store.record(job_id, index, line, failed)
                if images[index].url:
                    await asyncio.to_thread(spool.drop_fetched, self._folder, job_id, index)

        lanes = [asyncio.create_task(lane()) for _ in range(self._settings.jobs_concurrency)]
        try:
            await asyncio.gather(*lanes)
        except Postponed:
            pass
        finally:
            for task in lanes:
                task.cancel()
            await asyncio.gather(*lanes, return_exceptions=True)
        if len(await self._store.answered(job_id)) < len(images):
            return await self._store.is_open(job_id)
        await self._store.finish(job_id, "done")
        return False

    async def _answer(
        self, job_id: str, index: int, image: Image, query: str, until: float
    ) -> tuple[bytes, bool]:
        """The line of an image's result, and whether it is an error. Raises Postponed."""
        try:
            if image.url:
                data = await self._fetch(job_id, index, image.url)
            else:
                data = await asyncio.to_thread(read_image, self._folder, job_id, image)
        except NotFetched as exc:
            code, text = 502, orjson.dumps(error(502, "NotFetched", str(exc)))
        else:
            code, text = await self._classify(data, query, until)
        known = orjson.dumps({"index": index, "name": image.name, "code": code})
        return known[:-1] + b',"answer":' + text + b"}", code != 200

    async def _fetch(self, job_id: str, index: int, url: str) -> bytes:
        """An image by URL, fetched once, however long it waits. Raises NotFetched."""
        data = await asyncio.to_thread(spool.read_fetched, self._folder, job_id, index)
        if data is None:
            data = await self._outside.fetch(url)
            await asyncio.to_thread(spool.keep_fetched, self._folder, job_id, index, data)
        return data

    async def _classify(self, data: bytes, query: str, until: float) -> tuple[int, bytes]:
        """The gateway's status and answer. Raises Postponed if it has no place for the image."""
        wait, tries = 1.0, 0
        while True:
            status, content, after = await self._ask(data, query)
            if status not in FULL:
                tries += 1
                if status < 500 or tries == TRIES:
                    return status, content
            elif time.monotonic() > until:
                raise Postponed
            with suppress(asyncio.TimeoutError):
                seconds = max(after, wait * random.uniform(0.5, 1))  # noqa: S311 - no secret
                await asyncio.wait_for(self.stopping.wait(), seconds)
                raise Postponed
            wait = min(2 * wait, MAX_WAIT_SECONDS)

    async def _ask(self, data: bytes, query: str) -> tuple[int, bytes, float]:
        """Status, answer in JSON, and Retry-After in seconds; 503 if nobody answers."""
        try:
            async with (
                self._places,
                self._session.post(
                    f"http://gateway/predict?{query}", data=data, allow_redirects=False
                ) as answer,
            ):
                content = await answer.read()
                after = answer.headers.get("Retry-After", "")
                orjson.loads(content)
                return answer.status, content, float(after) if after.isdecimal() else 0.0
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError):
            return 503, b"", 0.0


def error(code: int, type: str, message: str) -> dict[str, object]:
    """The one form of errors, as handler/errors.py has it."""
    return {"status": "error", "code": code, "type": type, "message": message}
