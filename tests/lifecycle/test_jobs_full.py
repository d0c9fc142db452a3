"""Jobs with a Redis that is full: real ones, at their maxmemory."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError

from service.jobs.store import Store
from tests.lifecycle.conftest import RedisServer

T = TypeVar("T")
JOB: dict[str, Any] = {
    "id": "a" * 32,
    "client": "alice",
    "created": 0,
    "images": 1,
    "webhook": "https://x/",
}


def fill(redis_server: RedisServer) -> None:
    """Whatever is in it is too much from now on."""
    redis_server.client.config_set("maxmemory", "1")


def with_store(server: RedisServer, folder: Path, action: Callable[[Store], Awaitable[T]]) -> T:
    async def do() -> T:
        client = Redis.from_url(server.url, decode_responses=True)
        async with client:
            return await action(Store(client, folder, 60))

    return asyncio.run(do())


def test_jobs_end_and_webhooks_are_noted(redis_server: RedisServer, tmp_path: Path) -> None:
    async def check(store: Store) -> None:
        await store.create(JOB)
        fill(redis_server)
        with pytest.raises(OutOfMemoryError):
            await store.create(JOB | {"id": "b" * 32})
        assert await store.finish(JOB["id"], "cancelled")
        job = await store.get(JOB["id"])
        assert job is not None
        assert (job["state"], await store.open()) == ("cancelled", {})
        assert await store.due_webhooks() == [JOB["id"]]
        for again_seconds in (60.0, None):
            await store.log_attempt(JOB["id"], {"error": "status 500"}, again_seconds)
            assert await store.due_webhooks() == []
        assert len(await store.attempts(JOB["id"])) == 2
        assert redis_server.client.zcard("jobs:webhooks") == 0
        assert 0 < redis_server.client.ttl(f"jobs:{JOB['id']}:attempts") <= 60

    with_store(redis_server, tmp_path, check)
