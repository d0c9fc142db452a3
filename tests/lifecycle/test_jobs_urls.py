"""Images by URL, with a real Redis and a stand-in for the gateway."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from service.jobs import work
from service.jobs.settings import JobsSettings
from service.jobs.spool import Limits, Spool
from service.jobs.store import Store
from tests.lifecycle.conftest import RedisServer
from tests.lifecycle.jobs import with_store

ID = "a" * 32
NO_OPTIONS = dict.fromkeys(("top_k", "model", "version", "webhook"), "")


class Source:
    """The host that has the images."""

    def __init__(self) -> None:
        self.urls: list[str] = []

    async def fetch(self, url: str) -> bytes:
        self.urls.append(url)
        return url.encode()


def test_an_image_is_fetched_once_however_long_it_waits(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "SLICE_SECONDS", 0.1)
    urls = [f"https://host/{i}.jpg" for i in range(3)]
    job = NO_OPTIONS | {"id": ID, "client": "alice", "created": time.time(), "images": len(urls)}
    with Spool.create(tmp_path, Limits(3, 1, 1)) as new:
        for url in urls:
            new.add_url(url)
        new.commit(job)
    full = True
    bodies: list[bytes] = []

    async def answer(request: web.Request) -> web.Response:
        bodies.append(await request.read())
        return web.json_response({}, status=429 if full else 200)

    async def check(store: Store) -> None:
        nonlocal full
        await store.create(job)
        app = web.Application()
        app.router.add_post("/predict", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.UnixSite(runner, str(tmp_path / "sock")).start()
        config: Any = SimpleNamespace(
            settings=JobsSettings(jobs_concurrency=2),
            folder=str(tmp_path),
            gateway=str(tmp_path / "sock"),
            response_seconds=5,
            key="",
        )
        source: Any = Source()
        async with work.Work(store, source, config) as working:
            for _ in range(2):
                assert await working.advance(ID)
                assert sorted(source.urls) == urls[:2]  # two are tried at the same time
            full = False
            while await working.advance(ID):
                pass
        await runner.cleanup()
        assert sorted(source.urls) == urls
        assert set(bodies) == {url.encode() for url in urls}
        lines = b"".join([part async for part in store.results(ID, 3)]).splitlines()
        assert [json.loads(line)["code"] for line in lines] == [200] * 3
        assert not list((tmp_path / ID).glob("url-*"))

    with_store(redis_server, tmp_path, check)
