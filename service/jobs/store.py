"""Jobs in Redis: what is known of each, its results, and the webhooks that are due.

Whatever must not come apart is one script, which Redis also writes to its log as one. A full Redis
refuses a script whose first write takes memory, and no other: those that end something begin with
one that takes none.
"""

import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from service.jobs.spool import mark_ended

OPEN = "jobs:open"  # id -> client, of unfinished jobs
WEBHOOKS = "jobs:webhooks"  # id -> when it is due
PAGE = 20  # results that are read at once: with all of 1000 classes one has 60 KB

# A job that is there is left alone: the same one may be put in twice.
CREATE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV, 3))
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return 1
"""
# The first result of an image counts, and none after the job has ended.
RECORD = """
if redis.call('HGET', KEYS[1], 'finished') ~= '' then return 0 end
if redis.call('HSETNX', KEYS[2], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('HINCRBY', KEYS[1], 'done', 1)
redis.call('HINCRBY', KEYS[1], 'failed', ARGV[3])
redis.call('HSET', KEYS[1], 'state', 'running')
return 1
"""
FINISH = """
if redis.call('HGET', KEYS[1], 'finished') ~= '' then return 0 end
redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('HSET', KEYS[1], 'state', ARGV[2], 'reason', ARGV[3], 'finished', ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('EXPIRE', KEYS[2], ARGV[5])
if redis.call('HGET', KEYS[1], 'webhook') ~= '' then
    redis.call('ZADD', KEYS[4], ARGV[4], ARGV[1])
end
return 1
"""
PUT_OFF = """
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])
"""
LOG_ATTEMPT = """
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('RPUSH', KEYS[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
if ARGV[4] ~= '' then redis.call('ZADD', KEYS[2], ARGV[4], ARGV[1]) end
"""


class Store:
    """All of it, in one database of Redis. Methods raise redis.RedisError if that fails.

    `redis` is a redis.asyncio.Redis that decodes what it reads, `folder` the spool's.
    """

    def __init__(self, redis: Any, folder: Path, keep_seconds: int) -> None:
        self._redis = redis  # whose types leave open whether it decodes
        self._folder = folder
        self._keep_seconds = keep_seconds
        self._create = redis.register_script(CREATE)
        self._record = redis.register_script(RECORD)
        self._finish = redis.register_script(FINISH)
        self._put_off = redis.register_script(PUT_OFF)
        self._log_attempt = redis.register_script(LOG_ATTEMPT)

    async def create(self, job: Mapping[str, Any]) -> None:
        """Put a job in, unless it is there."""
        facts = {**job, "state": "queued", "done": 0, "failed": 0, "finished": "", "reason": ""}
        pairs = [part for pair in facts.items() for part in pair]
        await self._create(keys=[_key(job["id"]), OPEN], args=[job["id"], job["client"], *pairs])

    async def get(self, job_id: str) -> dict[str, str] | None:
        return await self._redis.hgetall(_key(job_id)) or None

    async def open(self) -> dict[str, str]:
        """The unfinished jobs, and whose they are."""
        return await self._redis.hgetall(OPEN)

    async def forget(self, job_id: str) -> None:
        """Take off the list of unfinished jobs one that is not there any more."""
        await self._redis.hdel(OPEN, job_id)

    async def is_open(self, job_id: str) -> bool:
        return bool(await self._redis.hexists(OPEN, job_id))

    async def answered(self, job_id: str) -> set[int]:
        """The images that have a result, by their indices."""
        return {int(field) for field in await self._redis.hkeys(_results(job_id))}

    async def record(self, job_id: str, index: int, line: bytes, failed: bool) -> None:
        """The result of an image, unless it has one or the job has ended."""
        await self._record(keys=[_key(job_id), _results(job_id)], args=[index, line, int(failed)])

    async def finish(self, job_id: str, state: str, reason: str = "") -> bool:
        """End a job, on the disk too; False if it has ended already, or is not there."""
        keys = [_key(job_id), _results(job_id), OPEN, WEBHOOKS]
        args = [job_id, state, reason, time.time(), self._keep_seconds]
        if not await self._finish(keys=keys, args=args):
            return False
        mark_ended(self._folder, job_id)
        return True

    async def results(self, job_id: str, images: int) -> AsyncIterator[bytes]:
        """The lines that there are, in the images' order."""
        for start in range(0, images, PAGE):
            indices = [str(i) for i in range(start, min(start + PAGE, images))]
            lines = await self._redis.hmget(_results(job_id), indices)
            yield b"".join(line.encode() + b"\n" for line in lines if line)

    async def due_webhooks(self) -> list[str]:
        return await self._redis.zrangebyscore(WEBHOOKS, 0, time.time(), start=0, num=20)

    async def put_off_webhook(self, job_id: str, seconds: float) -> None:
        """Before it is called: it is not due again until then, whatever happens meanwhile."""
        await self._put_off(keys=[WEBHOOKS], args=[job_id, time.time() + seconds])

    async def log_attempt(
        self, job_id: str, attempt: Mapping[str, Any], again_seconds: float | None
    ) -> None:
        """Note a call of a job's webhook, and when the next one is due, if any."""
        due = "" if again_seconds is None else time.time() + again_seconds
        keys = [_attempts(job_id), WEBHOOKS]
        await self._log_attempt(
            keys=keys, args=[job_id, orjson.dumps(attempt), self._keep_seconds, due]
        )

    async def drop_webhook(self, job_id: str) -> None:
        await self._redis.zrem(WEBHOOKS, job_id)

    async def attempts(self, job_id: str) -> list[dict[str, Any]]:
        return [orjson.loads(each) for each in await self._redis.lrange(_attempts(job_id), 0, -1)]


def _key(job_id: str) -> str:
    return f"jobs:{job_id}"


def _results(job_id: str) -> str:
    return f"jobs:{job_id}:results"


def _attempts(job_id: str) -> str:
    return f"jobs:{job_id}:attempts"
