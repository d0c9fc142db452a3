"""The jobs' process: it takes jobs, works on them, calls webhooks, and tidies up."""

import asyncio
import logging
import os
import signal
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, BinaryIO

import dramatiq
from aiohttp import web
from dramatiq.brokers.redis import RedisBroker
from redis import RedisError, ResponseError
from redis.asyncio import Redis

from service.jobs import spool
from service.jobs.api import Api, describe
from service.jobs.outside import Outside
from service.jobs.process import LISTENING, Config
from service.jobs.store import Store
from service.jobs.work import Work
from service.logs import Log

NAMESPACE, QUEUE = "jobs:queue", "advance"
JOBS_AT_ONCE = 4  # that take turns; what is classified at once is a setting
HEARTBEAT_MS = 5_000  # a worker that has not been heard of for so long has died with its messages
ALWAYS = 1_000_000  # in a million of Redis' commands: look for such workers
TIDY_SECONDS = 5.0
TAKEN_SECONDS = 120.0  # within which a message that was taken off the queue is worked on
WEBHOOK_SECONDS = 1.0
CALLED_SECONDS = 60.0  # until a webhook is called again if the process dies during a call
KEPT_SECONDS = 60.0  # a finished job's images: until Redis has certainly written that to its disk
AGAIN_SECONDS = (5, 30, 120, 600, 3600)  # until a webhook that failed is called again
REDIS_SECONDS = 5
LOG = logging.getLogger(__name__)


class _Lines(logging.Handler):
    """What libraries log, as lines of ours."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.event(record.levelname, "jobs", message=self.format(record))


def serve_from(source: BinaryIO) -> int:
    """Serve as the Config on `source` says, until SIGTERM; the exit status."""
    log = Log("json")
    logging.basicConfig(handlers=[_Lines(log)], level=logging.WARNING)
    return asyncio.run(_serve(Config.read(source.read()), log))


async def _serve(config: Config, log: Log) -> int:
    folder = Path(config.folder)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        message = f"GATEWAY_JOBS_FOLDER: this user cannot write to {folder}"
        log.event("ERROR", "jobs", message=message)
        return 2
    spool.forget_arriving(folder)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with AsyncExitStack() as stack:
        redis = Redis.from_url(
            config.settings.jobs_url,
            decode_responses=True,
            socket_timeout=REDIS_SECONDS,
            socket_connect_timeout=REDIS_SECONDS,
        )
        stack.push_async_callback(redis.aclose)
        store = Store(redis, folder, config.settings.jobs_keep_seconds)
        key = bytes.fromhex(config.secret)
        outside = await stack.enter_async_context(
            Outside(config.settings, key, config.max_image_bytes)
        )
        work = await stack.enter_async_context(Work(store, outside, config))
        queue = Queue(config.settings.jobs_url, work)
        keeper = Keeper(store, outside, queue, config)
        api = Api(store, outside, config, queue.send, work.stopping)
        runner = web.AppRunner(
            api.application(), access_log=None, shutdown_timeout=config.stop_seconds
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        Path(config.socket).unlink(missing_ok=True)  # one that has died leaves it
        await web.UnixSite(runner, config.socket).start()
        Path(config.socket).chmod(0o666)  # nginx's user may be another; the folder is closed
        queue.worker.start()
        tasks = [
            asyncio.create_task(_repeat(keeper.tidy, TIDY_SECONDS, log)),
            asyncio.create_task(_repeat(keeper.call_webhooks, WEBHOOK_SECONDS, log)),
        ]
        log.event("INFO", "jobs", message=f"{LISTENING}, and kept in {folder}")
        await stop.wait()
        work.stopping.set()
        for task in tasks:
            task.cancel()
        await asyncio.to_thread(queue.worker.stop, timeout=config.stop_seconds * 1000)
    return 0


async def _repeat(action: Callable[[], Awaitable[None]], seconds: float, log: Log) -> None:
    """Do it again and again; a failure is logged once, until it works again."""
    failed = ""
    while True:
        try:
            await action()
            failed = ""
        except (RedisError, OSError, dramatiq.errors.DramatiqError) as exc:
            if type(exc).__name__ != failed:
                failed = type(exc).__name__
                log.event("ERROR", "jobs", message=f"{failed}: {exc}; it is tried again")
        except Exception:
            log.event("ERROR", "jobs", message="this is a bug", cause=traceback.format_exc())
        await asyncio.sleep(seconds)


class Queue:
    """Dramatiq's queue of jobs that are to advance, and its worker.

    A message is taken off only after its slice: if the process dies, another gets it. Forking for
    each job, as RQ does, would cost more than a slice, and RQ counts a killed job as failed.
    """

    def __init__(self, url: str, work: Work) -> None:
        loop = asyncio.get_running_loop()
        self._work = work
        self._broker: Any = RedisBroker(  # type: ignore[no-untyped-call]
            url=url,
            namespace=NAMESPACE,
            middleware=[],
            heartbeat_timeout=HEARTBEAT_MS,
            maintenance_chance=ALWAYS,
        )

        def advance(job_id: str) -> None:
            going_on = asyncio.run_coroutine_threadsafe(work.advance(job_id), loop).result()
            if going_on:
                self._actor.send(job_id)

        self._actor: Any = dramatiq.actor(broker=self._broker, queue_name=QUEUE)(advance)
        self.worker = dramatiq.Worker(self._broker, worker_threads=JOBS_AT_ONCE)

    async def send(self, job_id: str) -> None:
        await asyncio.to_thread(self._actor.send, job_id)

    async def waiting(self) -> set[str]:
        """The jobs that have a message, also one that is being worked on."""
        return await asyncio.to_thread(self._read)

    def _read(self) -> set[str]:
        name, client = f"{NAMESPACE}:{QUEUE}", self._broker.client
        queued = set(client.lrange(name, 0, -1))
        waiting = set(self._work.running)
        # One that is neither queued nor being worked on was just taken, or is lost: a Redis that
        # is full, or whose answer was lost, leaves it so for ever.
        lost_before = (time.time() - TAKEN_SECONDS) * 1000
        for message_id, text in client.hgetall(f"{name}.msgs").items():
            message = dramatiq.Message.decode(text)
            if message_id in queued or message.message_timestamp > lost_before:
                waiting.add(message.args[0])
        return waiting


class Keeper:
    """What is done from time to time."""

    def __init__(self, store: Store, outside: Outside, queue: Queue, config: Config) -> None:
        self._store, self._outside, self._queue = store, outside, queue
        self._settings = config.settings
        self._folder = Path(config.folder)

    async def tidy(self) -> None:
        """Remove what is not needed, end what is too old, and put back what Redis has lost.

        What Redis refuses for one job, as when it is full, is still done for the others.
        """
        refused = None
        for job_id in spool.jobs_in(self._folder):
            try:
                await self._tidy_folder(job_id)
            except ResponseError as exc:
                refused = exc
        waiting = await self._queue.waiting()
        for job_id in await self._store.open():
            try:
                await self._tidy_open(job_id, job_id in waiting)
            except ResponseError as exc:
                refused = exc
        if refused:
            raise refused

    async def _tidy_folder(self, job_id: str) -> None:
        job = await self._store.get(job_id)
        kept = spool.read_job(self._folder, job_id)
        now = time.time()
        if job and job["finished"]:  # for a server that was killed between the two
            await asyncio.to_thread(spool.mark_ended, self._folder, job_id)
        if kept and spool.has_ended(self._folder, job_id):
            kept = None
        if job is None and kept and now - kept["created"] < self._settings.jobs_max_age_seconds:
            await self._store.create(kept)
        elif job is None or (job["finished"] and now - float(job["finished"]) > KEPT_SECONDS):
            await asyncio.to_thread(spool.remove, self._folder, job_id)

    async def _tidy_open(self, job_id: str, waits: bool) -> None:
        job = await self._store.get(job_id)
        if job is None:
            await self._store.forget(job_id)
        elif time.time() - float(job["created"]) > self._settings.jobs_max_age_seconds:
            await self._store.finish(job_id, "failed", "it took too long")
        elif not waits:
            await self._queue.send(job_id)

    async def call_webhooks(self) -> None:
        """Call those that are due, and note what became of it."""
        for job_id in await self._store.due_webhooks():
            job = await self._store.get(job_id)
            if job is None or not job["webhook"]:
                await self._store.drop_webhook(job_id)
                continue
            tried = len(await self._store.attempts(job_id))
            told = job | {"webhook": ""}
            body = await describe(self._store, told, self._settings.jobs_keep_seconds)
            # A Redis that takes no more writes refuses this, before somebody is called in vain.
            await self._store.put_off_webhook(job_id, CALLED_SECONDS)
            since = time.time()
            failure = await self._outside.call(job["webhook"], f"job_{job_id}", body)
            attempt = {"time": since, "seconds": time.time() - since, "error": failure or None}
            more = failure and tried < len(AGAIN_SECONDS)
            if failure and not more:
                LOG.warning("the webhook of job %s is given up: %s", job_id, failure)
            await self._store.log_attempt(job_id, attempt, AGAIN_SECONDS[tried] if more else None)
