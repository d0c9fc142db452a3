"""The routes of /jobs. nginx has looked at the key, and says in X-Client whose it is."""

import asyncio
import hashlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web
from redis import RedisError, ResponseError

from service.jobs import spool
from service.jobs.outside import Outside
from service.jobs.process import Config
from service.jobs.spool import Limits, Refused, Spool
from service.jobs.store import Store
from service.jobs.uploads import Upload
from service.jobs.work import error

MAX_UPLOADS = 8  # bodies that arrive at the same time
MAX_UPLOADS_PER_CLIENT = 4  # so that one that is slow leaves room for others
MAX_STREAMS = 100  # of events and results, at the same time
MAX_STREAMS_PER_CLIENT = 20
WATCH_SECONDS = 0.5  # between two looks for one
COMMENT_SECONDS = 15  # after which an idle stream gets a comment, so that nobody closes it
MAX_KEY = 255  # characters of an Idempotency-Key
LOG = logging.getLogger(__name__)
ID = "{id:[0-9a-f]{32}}"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Api:
    def __init__(
        self,
        store: Store,
        outside: Outside,
        config: Config,
        send: Callable[[str], Awaitable[None]],
        stopping: asyncio.Event,
    ) -> None:
        """`send` lets a job begin."""
        self._store, self._outside, self._send = store, outside, send
        self._stopping = stopping
        self._settings = settings = config.settings
        self._folder = Path(config.folder)
        self._limits = Limits(
            settings.jobs_max_images, config.max_image_bytes, settings.jobs_max_bytes
        )
        self._uploads, self._streams = Counter[str](), Counter[str]()  # by client

    def application(self) -> web.Application:
        app = web.Application(middlewares=[answer_errors])
        app.router.add_post("/jobs", self._post)
        # aiohttp would send the body of a stream after the answer to a HEAD, where the next answer
        # of the connection is expected.
        app.router.add_get(f"/jobs/{ID}", self._get, allow_head=False)
        app.router.add_delete(f"/jobs/{ID}", self._cancel)
        app.router.add_get(f"/jobs/{ID}/events", self._watch, allow_head=False)
        app.router.add_get(f"/jobs/{ID}/results", self._results, allow_head=False)
        return app

    async def _post(self, request: web.Request) -> web.Response:
        client = request.headers.get("X-Client", "")
        key = request.headers.get("Idempotency-Key", "")
        if len(key) > MAX_KEY or not key.isascii():
            message = f"Idempotency-Key must be ASCII, and at most {MAX_KEY} characters"
            raise Refused(400, "BadRequest", message)
        # The same key makes the same id, so that two requests at once make one job.
        job_id = secrets.token_hex(16)
        if key:
            job_id = hashlib.sha256(orjson.dumps([client, key])).hexdigest()[:32]
        await self._check_room(client, job_id)  # and when it has arrived: others do meanwhile
        arriving = place(
            self._uploads, client, MAX_UPLOADS_PER_CLIENT, MAX_UPLOADS, "jobs are arriving"
        )
        with arriving, Spool.create(self._folder, self._limits) as new:
            upload = Upload(new, self._limits, self._outside)
            try:
                await asyncio.wait_for(upload.receive(request), self._settings.jobs_body_seconds)
            except asyncio.TimeoutError:
                raise Refused(408, "RequestTimeout", "the body came too slowly") from None
            digest = hashlib.sha256(orjson.dumps([upload.options, upload.digest])).hexdigest()
            job = {
                "id": job_id,
                "client": client,
                "created": time.time(),
                "images": upload.count,
                "digest": digest,
            } | upload.options
            await self._accept(new, job)
        return await self._describe(job_id, 202, {"Location": f"/jobs/{job_id}"})

    async def _check_room(self, client: str, job_id: str) -> None:
        """Raises Refused if there is none for another job."""
        unfinished = await self._store.open()
        settings = self._settings
        own = sum(owner == client for owner in unfinished.values())
        full = own >= settings.jobs_max_open_per_client or len(unfinished) >= settings.jobs_max_open
        if full and job_id not in unfinished:
            raise Refused(
                429,
                "TooManyJobs",
                f"too many unfinished jobs: of one client {settings.jobs_max_open_per_client}, "
                f"of all {settings.jobs_max_open}",
            )
        used = await asyncio.to_thread(spool.used_bytes, self._folder)
        if used >= settings.jobs_folder_bytes:
            raise Refused(503, "Unavailable", "the disk for jobs is full; try again later")

    async def _accept(self, new: Spool, job: dict[str, Any]) -> None:
        """Keep a job, unless the one with its id is there. Raises Refused if that is another."""
        known = await self._store.get(job["id"])
        if known is None:
            await self._check_room(job["client"], job["id"])
            if not await asyncio.to_thread(new.commit, job):
                known = spool.read_job(self._folder, job["id"])
                if known is None:
                    raise Refused(503, "Unavailable", "the disk for jobs has lost one; try again")
        if known is None:
            try:
                await self._store.create(job)
            except ResponseError:  # Redis has it not, and the client is told so
                spool.remove(self._folder, job["id"])
                raise
            with suppress(RedisError):  # then the keeper sends it
                await self._send(job["id"])
        elif known["digest"] != job["digest"]:
            raise Refused(
                422, "IdempotencyKeyReused", "another job was made with this Idempotency-Key"
            )

    async def _job(self, request: web.Request) -> dict[str, str]:
        """The job that is asked for. Raises Refused if there is none, or it is another client's."""
        job = await self._store.get(request.match_info["id"])
        if job is None or job["client"] != request.headers.get("X-Client", ""):
            raise Refused(404, "NotFound", "there is no such job")
        return job

    async def _get(self, request: web.Request) -> web.Response:
        return await self._describe((await self._job(request))["id"])

    async def _describe(
        self, job_id: str, status: int = 200, headers: dict[str, str] | None = None
    ) -> web.Response:
        job = await self._store.get(job_id)
        if job is None:  # another request has made it, and Redis does not have it yet
            raise Refused(503, "Unavailable", "the job is just being made; ask again")
        body = await describe(self._store, job, self._settings.jobs_keep_seconds)
        return web.Response(
            status=status, body=body, content_type="application/json", headers=headers
        )

    async def _cancel(self, request: web.Request) -> web.Response:
        job = await self._job(request)
        await self._store.finish(job["id"], "cancelled")
        return await self._describe(job["id"])

    async def _results(self, request: web.Request) -> web.StreamResponse:
        job = await self._job(request)
        with self._stream(job["client"]):
            answer = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
            await answer.prepare(request)
            try:
                async for lines in self._store.results(job["id"], int(job["images"])):
                    await answer.write(lines)
                await answer.write_eof()
            except RedisError:
                if request.transport:
                    request.transport.abort()  # so that nobody takes half of it for the whole
        return answer

    def _stream(self, client: str) -> AbstractContextManager[None]:
        return place(self._streams, client, MAX_STREAMS_PER_CLIENT, MAX_STREAMS, "streams are open")

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events: `progress` whenever something has changed, `end` as the last."""
        job = await self._job(request)
        job_id = job["id"]
        with self._stream(job["client"]):
            answer = web.StreamResponse(
                headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
            )
            await answer.prepare(request)
            told, since = b"", time.monotonic()
            while not self._stopping.is_set():
                with suppress(RedisError):  # it comes back, and the stream goes on
                    now = await self._store.get(job_id)
                    if now is None:
                        break
                    body = await describe(self._store, now, self._settings.jobs_keep_seconds)
                    if body != told:
                        kind = b"end" if now["finished"] else b"progress"
                        await answer.write(b"event: " + kind + b"\ndata: " + body + b"\n\n")
                        told, since = body, time.monotonic()
                    if now["finished"]:
                        break
                if time.monotonic() - since > COMMENT_SECONDS:
                    await answer.write(b":\n\n")
                    since = time.monotonic()
                await asyncio.sleep(WATCH_SECONDS)
            return answer


@contextmanager
def place(taken: Counter[str], client: str, own: int, everybody: int, what: str) -> Iterator[None]:
    """One of the places that clients share. Raises Refused if there is none."""
    if taken[client] >= own or taken.total() >= everybody:
        raise Refused(429, "TooManyRequests", f"too many {what}; try again")
    taken[client] += 1
    try:
        yield
    finally:
        taken[client] -= 1
        if not taken[client]:
            del taken[client]


async def describe(store: Store, job: dict[str, str], keep_seconds: int) -> bytes:
    """A job as JSON, for its client."""
    finished = float(job["finished"]) if job["finished"] else None
    facts: dict[str, Any] = {
        "id": job["id"],
        "state": job["state"],
        "reason": job["reason"] or None,
        "images": int(job["images"]),
        "done": int(job["done"]),
        "failed": int(job["failed"]),
        "created": _time(float(job["created"])),
        "finished": finished and _time(finished),
        "expires": finished and _time(finished + keep_seconds),
        "results": f"/jobs/{job['id']}/results",
    }
    if job["webhook"]:
        facts["webhook"] = {"url": job["webhook"], "attempts": await store.attempts(job["id"])}
    return orjson.dumps(facts)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error in the one form of errors."""
    headers = {}
    try:
        return await handler(request)
    except Refused as exc:
        facts = error(exc.status, exc.type, str(exc))
    except web.HTTPMethodNotAllowed as exc:
        allowed = ", ".join(sorted(exc.allowed_methods))
        headers = {"Allow": allowed}
        facts = error(
            405, "MethodNotAllowed", f"the method is not allowed here; allowed: {allowed}"
        )
    except web.HTTPNotFound:
        facts = error(404, "NotFound", "there is nothing here; see /openapi.json")
    except web.HTTPRequestEntityTooLarge:
        facts = error(413, "RequestTooLarge", "a part's headers are too large")
    except RedisError as exc:
        LOG.error("Redis: %s: %s", type(exc).__name__, exc)
        facts = error(503, "Unavailable", "the jobs cannot be reached now; try again")
    except web.HTTPException:
        raise
    except ConnectionError:  # the client's, who does not see this any more
        facts = error(503, "Unavailable", "the connection was lost")
    except OSError as exc:
        LOG.error("GATEWAY_JOBS_FOLDER: %s", exc)
        facts = error(503, "Unavailable", "the disk for jobs cannot be written; try again later")
    except Exception:
        LOG.exception("this is a bug")
        facts = error(500, "InternalError", "the service failed; its log has the cause")
    return web.Response(
        status=int(str(facts["code"])),
        body=orjson.dumps(facts),
        content_type="application/json",
        headers=headers,
    )
