"""Results that replicas share, in a Redis beside the cache of each worker.

Whatever Redis does, no request fails of it and none waits longer than PATIENCE_SECONDS: after that
it is a miss. After FAILURES misses of this kind nobody asks any more, until a thread in the
background, which also writes what was classified, finds that Redis answers in time again. It does
so before the first question, too: no request pays for a connection.
"""

import hashlib
import json
import logging
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from threading import Thread
from time import monotonic, perf_counter, sleep
from typing import Any

from handler import metrics
from handler.cache import Result
from handler.cache_url import shown_url
from handler.collector import Metrics
from handler.decoders import Decoder
from handler.engine import Engine
from handler.errors import InvalidSettings, SetupError
from handler.logs import log_line
from handler.model_card import ModelCard
from handler.settings import Settings
from handler.shared_result import VERSION, pack, unpack

PATIENCE_SECONDS = 0.004  # of a batch for its results
SOCKET_SECONDS = 0.1  # of the threads that nobody waits for
FAILURES = 3  # one after the other
PROBE_SECONDS = 1.0
WRITE_SECONDS = 0.1  # between two writes, so that they come after the answers
MAX_WRITES = 512  # results that wait to be written
KEPT_CLASSES = 20  # of a result, or CLASSIFIER_TOP_K if that is more

# What decodes and computes: another version may give another answer.
LIBRARIES = ("torch", "torchvision", "openvino", "simplejpeg", "pillow")


def scope_of(card: ModelCard, engine: Engine, decoder: Decoder, settings: Settings) -> str:
    """What an answer depends on besides the image, as 32 hexadecimal digits.

    The card has the sha256 of every file of the archive: tensors, code, labels.
    """
    facts = [
        card.to_json(),
        [engine.name, engine.device.partition(":")[0]],
        [decoder.name, decoder.samplings, settings.decode],
        [version(name) for name in LIBRARIES],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


class SharedCache:
    """Results by the keys of ResultCache."""

    def __init__(self, settings: Settings, scope: str, classes: int, counts: Metrics) -> None:
        """`classes` is the number of the model's. Raises SetupError if the client is missing."""
        self._prefix = f"classifier:{VERSION}:{scope}:"
        self.classes = classes
        self._kept = max(KEPT_CLASSES, settings.top_k)
        self._ttl_seconds = settings.cache_ttl_seconds
        self._counts = counts
        self._url = shown_url(settings.cache_url)
        self._redis = _connect(settings.cache_url)
        self._reader = ThreadPoolExecutor(1, "shared-cache-read")
        self._question: Future[Any] | None = None  # the last one, perhaps still without its answer
        self._writes: deque[tuple[bytes, Result]] = deque()
        self._failures = 0  # one after the other
        self._cause: str | None = "not yet connected"  # why nobody asks; None: all do
        Thread(target=self._work, name="shared-cache", daemon=True).start()

    def describe(self) -> dict[str, Any]:
        """For `info`: of this worker. The cause is without its text, which has the address."""
        cause = self._cause
        return {"healthy": cause is None, "cause": cause and cause.partition(":")[0]}

    def get(self, keys: Mapping[bytes, int]) -> dict[bytes, Result]:
        """What is known of keys, each with the number of best classes that are needed."""
        if not keys:
            return {}
        if self._cause is not None or (self._question and not self._question.done()):
            self._count("skipped", len(keys))
            return {}
        names = [self._name(key) for key in keys]
        started = perf_counter()
        found = {}
        try:
            self._question = self._reader.submit(self._redis.mget, names)
            values = self._question.result(PATIENCE_SECONDS)
            for key, name, value in zip(keys, names, values, strict=True):
                result = unpack(name, value, self.classes)
                if result and result.suffices(keys[key]):
                    found[key] = result
        except Exception as exc:  # no answer in time, or whatever the client raises
            self._count("error", len(keys))
            self._failures += 1
            if self._failures >= FAILURES:
                self._give_up(exc)
            return {}
        finally:
            self._counts.observe(metrics.SHARED_SECONDS, perf_counter() - started)
        self._failures = 0
        self._count("hit", len(found))
        self._count("miss", len(keys) - len(found))
        return found

    def put(self, key: bytes, result: Result) -> None:
        """Write a result in a moment, unless too many wait for that."""
        if self._cause is not None or len(self._writes) >= MAX_WRITES:
            self._counts.add(metrics.SHARED_WRITES, 1, "dropped")
        else:
            self._writes.append((key, result))

    def _name(self, key: bytes) -> bytes:
        """Redis' key: what people can read, and find with a pattern."""
        digest, shape = key[:32], key[32:]
        return f"{self._prefix}{digest.hex()}{':' if shape else ''}".encode() + shape

    def _count(self, result: str, images: int) -> None:
        self._counts.add(metrics.SHARED_LOOKUPS, images, result)

    # --- In the background

    def _work(self) -> None:
        probed = -PROBE_SECONDS
        while True:
            if self._cause is None:
                self._write()
            elif monotonic() - probed >= PROBE_SECONDS:
                self._probe()
                probed = monotonic()
            sleep(WRITE_SECONDS)

    def _probe(self) -> None:
        """Ask again from now on, if Redis answers in time."""
        try:
            self._redis.ping()  # connects
            started = perf_counter()
            self._redis.mget([self._name(b"")])
            if perf_counter() - started > PATIENCE_SECONDS:
                raise TimeoutError
        except Exception as exc:  # whatever the client raises
            self._give_up(exc)
        else:
            self._failures, self._cause = 0, None
            log_line(logging.INFO, "shared_cache_ready", url=self._url)

    def _give_up(self, exc: Exception) -> None:
        name = type(exc).__name__  # the client has a TimeoutError of its own
        cause = f"{name}: {'no answer in time' if name == 'TimeoutError' else exc}"
        if cause != self._cause:  # once, however long it lasts
            log_line(logging.WARNING, "shared_cache_failed", url=self._url, cause=cause)
        self._cause = cause

    def _write(self) -> None:
        """Write what waits, in one round trip."""
        waiting = [self._writes.popleft() for _ in range(len(self._writes))]
        if not waiting:
            return
        try:
            pipeline = self._redis.pipeline(transaction=False)
            for key, result in waiting:
                name = self._name(key)
                pipeline.set(name, pack(name, result, self._kept), ex=self._ttl_seconds)
            outcomes = pipeline.execute(raise_on_error=False)
        except Exception as exc:  # whatever the client raises
            outcomes = [exc] * len(waiting)
        failed = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        self._counts.add(metrics.SHARED_WRITES, len(waiting) - len(failed), "written")
        self._counts.add(metrics.SHARED_WRITES, len(failed), "error")


def _connect(url: str) -> Any:
    """A client, which connects when it is first used. Raises SetupError."""
    try:
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError:
        raise SetupError(
            "cache_url (CLASSIFIER_CACHE_URL) needs the package of requirements-cache.txt; "
            "redis is missing"
        ) from None
    try:
        return Redis.from_url(
            url,
            socket_timeout=SOCKET_SECONDS,
            socket_connect_timeout=SOCKET_SECONDS,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            driver_info=None,  # two commands less for each connection
        )
    except ValueError:  # which might quote the password
        raise InvalidSettings("cache_url has an option that the client does not know") from None
