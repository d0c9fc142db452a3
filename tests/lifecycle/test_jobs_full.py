"""Jobs with a real Redis at its maxmemory, and with a folder that has no room."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import OutOfMemoryError, ResponseError

from service.jobs import spool
from service.jobs.server import Keeper
from service.jobs.settings import JobsSettings
from service.jobs.spool import Limits, Spool
from service.jobs.store import Store
from tests.gateway.clients import check_error
from tests.lifecycle.conftest import RedisServer
from tests.lifecycle.jobs import TIMEOUT, form, numbered, serving_jobs, with_store
from tests.processes import events, wait_for

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


def test_what_redis_refuses_for_one_job_is_done_for_the_others(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    class NoQueue:
        async def waiting(self) -> set[str]:
            return set()

    with Spool.create(tmp_path, Limits(1, 1, 1)) as new:
        new.commit(JOB | {"id": "1" * 32, "created": time.time()})  # Redis does not know it
    with Spool.create(tmp_path, Limits(1, 1, 1)) as new:
        new.commit(JOB | {"id": "2" * 32})
    spool.mark_ended(tmp_path, "2" * 32)

    async def check(store: Store) -> None:
        await store.create(JOB)
        fill(redis_server)
        config = SimpleNamespace(settings=JobsSettings(), folder=str(tmp_path))
        keeper = Keeper(store, None, NoQueue(), config)  # type: ignore[arg-type]
        with pytest.raises(OutOfMemoryError):
            await keeper.tidy()
        job = await store.get(JOB["id"])
        assert job is not None
        assert job["reason"] == "it took too long"
        assert spool.jobs_in(tmp_path) == ["1" * 32]

    with_store(redis_server, tmp_path, check)


def test_no_webhook_is_called_if_that_cannot_be_noted(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    called = []

    class Others:
        async def call(self, url: str, message_id: str, body: bytes) -> str:
            called.append(url)
            return ""

    async def check(store: Store) -> None:
        await store.create(JOB)
        assert await store.finish(JOB["id"], "done")
        config = SimpleNamespace(settings=JobsSettings(), folder=str(tmp_path))
        keeper = Keeper(store, Others(), None, config)  # type: ignore[arg-type]
        redis_server.client.config_set("min-replicas-to-write", "1")  # it refuses to write
        with pytest.raises(ResponseError):
            await keeper.call_webhooks()
        assert called == []
        redis_server.client.config_set("min-replicas-to-write", "0")
        fill(redis_server)
        for _ in range(2):
            await keeper.call_webhooks()
        assert called == [JOB["webhook"]]

    with_store(redis_server, tmp_path, check)


def test_what_is_refused_is_not_kept(redis_server: RedisServer, tmp_path: Path) -> None:
    with serving_jobs(tmp_path, redis_server) as served:
        served.torchserve.seconds = 0.2
        job = served.alice.post(*numbered(100))
        wait_for(lambda: served.alice.get(job)["done"] >= 1, TIMEOUT)
        fill(redis_server)
        for _ in range(2):
            answer = served.alice.ask("POST", files=form(b"one"))
            check_error(answer, 503, "Unavailable")
        assert [path.name for path in served.folder.iterdir()] == [job["id"]]
        said = [line["message"] for line in events(served.gateway.stdout.read_text(), "jobs")]
        assert any("OutOfMemoryError" in message for message in said)
        assert served.alice.ask("DELETE", f"/jobs/{job['id']}").json()["state"] == "cancelled"


def test_the_folder_is_full_for_whoever_comes(redis_server: RedisServer, tmp_path: Path) -> None:
    with serving_jobs(tmp_path, redis_server, jobs_folder_bytes="30000") as served:
        served.torchserve.seconds = 5.0
        may_end = threading.Event()

        def slow() -> Iterator[bytes]:
            yield b"--x\r\n\r\n"
            may_end.wait(TIMEOUT)
            yield b"image\r\n--x--\r\n"

        mixed = {"Content-Type": "multipart/mixed; boundary=x"}
        with ThreadPoolExecutor(1) as pool:
            arriving = pool.submit(served.bob.ask, "POST", data=slow(), headers=mixed)
            wait_for(lambda: list(served.folder.glob(".new-*")), TIMEOUT)
            key = {"Idempotency-Key": "k"}
            job = served.alice.post(bytes(29_900), headers=key)  # with what is known of it: all
            again = served.alice.ask("POST", files=form(bytes(29_900)), headers=key)
            may_end.set()
            for answer in (again, arriving.result()):
                check_error(answer, 503, "Unavailable")
        assert [path.name for path in served.folder.iterdir()] == [job["id"]]
