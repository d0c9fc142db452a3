"""The cache that replicas share, with a real Redis: hits, and whatever can happen to Redis."""

import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from handler.cache import Result, ResultCache
from handler.collector import Metrics
from handler.image_classifier import ImageClassifier
from handler.settings import Settings
from handler.shared_cache import FAILURES, MAX_WRITES, SharedCache, scope_of
from tests.drawing import encode, noise
from tests.lifecycle.conftest import RedisServer
from tests.load import Load
from tests.processes import free_port, wait_for
from tests.server.serving import serving
from tests.unit.handler.worker import JPEG, PNG, Fake, Reply, ask, b64, start

SCOPE = "0" * 32
PROBABILITIES = np.random.default_rng(0).dirichlet([0.1] * 1000).astype(np.float32)
RESULT = Result((640, 480), PROBABILITIES)
KEY = ResultCache.key(b"image")


class Shared:
    """A cache with what it counts."""

    def __init__(self, url: str, scope: str = SCOPE, **settings: Any) -> None:
        self._read: Counter[str] = Counter()

        def emit(name: str, value: float, labels: Sequence[str]) -> None:
            self._read[f"{name} {labels[-1]}"] += int(value)

        self._metrics = Metrics(emit, "birds", "1.0")
        self.cache = SharedCache(Settings(cache_url=url, **settings), scope, 1000, self._metrics)

    def wait(self, healthy: bool = True) -> "Shared":
        wait_for(lambda: self.cache.describe()["healthy"] is healthy, 20, self.cache.describe)
        return self

    def get(self, key: bytes = KEY, classes: int = 5) -> Result | None:
        return self.cache.get({key: classes}).get(key)

    def keep(self, *keys: bytes) -> None:
        """Put a result under keys, and return once it is written."""
        before = self.writes("written")
        for key in keys or [KEY]:
            self.cache.put(key, RESULT)
        wait_for(lambda: self.writes("written") == before + len(keys or [KEY]), 20)

    def lookups(self, result: str) -> int:
        return self._count(f"classifier_shared_cache_lookups_total {result}")

    def writes(self, result: str) -> int:
        return self._count(f"classifier_shared_cache_writes_total {result}")

    def _count(self, series: str) -> int:
        self._metrics.flush()
        return self._read[series]


# --- What it gives


def test_what_one_worker_keeps_another_finds(redis_server: RedisServer) -> None:
    one, other = Shared(redis_server.url).wait(), Shared(redis_server.url).wait()
    assert other.get() is None
    one.keep()
    found = other.get(classes=20)
    assert found
    assert found.size == RESULT.size
    best = PROBABILITIES.argsort()[:-21:-1]
    assert np.array_equal(found.probabilities[best], PROBABILITIES[best])
    assert (other.lookups("hit"), other.lookups("miss")) == (1, 1)


def test_who_needs_more_classes_than_are_kept_misses(redis_server: RedisServer) -> None:
    shared = Shared(redis_server.url).wait()
    shared.keep()
    assert shared.get(classes=21) is None
    more = Shared(redis_server.url, top_k=30).wait()
    more.keep()
    assert shared.get(classes=30)


def test_a_batch_is_one_question(redis_server: RedisServer) -> None:
    shared = Shared(redis_server.url).wait()
    keys = [ResultCache.key(str(number).encode()) for number in range(64)]
    shared.keep(*keys[:40])
    asked = redis_server.client.info("commandstats")["cmdstat_mget"]["calls"]
    assert set(shared.cache.get(dict.fromkeys(keys, 5))) == set(keys[:40])
    assert redis_server.client.info("commandstats")["cmdstat_mget"]["calls"] == asked + 1


def test_a_result_is_kept_for_its_time(redis_server: RedisServer) -> None:
    shared = Shared(redis_server.url, cache_ttl_seconds=1).wait()
    shared.keep()
    assert shared.get()
    time.sleep(1.1)
    assert shared.get() is None
    Shared(redis_server.url).wait().keep()
    [name] = redis_server.client.keys()
    assert 86_390 <= redis_server.client.ttl(name) <= 86_400


def test_another_scope_is_another_cache(redis_server: RedisServer) -> None:
    Shared(redis_server.url).wait().keep()
    assert Shared(redis_server.url, scope="1" * 32).wait().get() is None


def test_what_others_wrote_is_a_miss(redis_server: RedisServer) -> None:
    shared = Shared(redis_server.url).wait()
    other = ResultCache.key(b"other")
    shared.keep(KEY, other)
    redis = redis_server.client
    mine, foreign = sorted(redis.keys(), key=lambda name: KEY.hex().encode() not in name)
    for value in (b"garbage", b"", b"\x01" * 178, redis.get(foreign)):
        redis.set(mine, value or b"")
        assert shared.get() is None
    redis.delete(mine)
    redis.hset(mine, "a", "hash")
    assert shared.get() is None
    assert shared.lookups("error") == 0
    shared.keep()
    assert shared.get()


def test_over_tls_and_over_a_unix_socket(
    redis_server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key, certificate, port = tmp_path / "key.pem", tmp_path / "certificate.pem", free_port()
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=cache", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-out", str(certificate), "-keyout", str(key)]
    subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)
    redis_server.kill()
    redis_server.start(
        *("--unixsocket", str(tmp_path / "redis.sock")),
        *("--tls-port", str(port), "--tls-auth-clients", "no"),
        *("--tls-key-file", str(key), "--tls-cert-file", str(certificate)),
        *("--tls-ca-cert-file", str(certificate)),
    )
    tls = f"rediss://127.0.0.1:{port}"
    Shared(f"{tls}?ssl_ca_certs={certificate}").wait().keep()
    assert Shared(f"unix://{tmp_path}/redis.sock").wait().get()
    Shared(tls)
    wait_for(lambda: "CERTIFICATE_VERIFY_FAILED" in caplog.text, 20, lambda: caplog.text)


# --- What happens to Redis


def test_a_full_redis_evicts_or_refuses(redis_server: RedisServer) -> None:
    shared = Shared(redis_server.url).wait()
    redis = redis_server.client
    redis.config_set("maxmemory", redis.info("memory")["used_memory"] + 200_000)
    redis.config_set("maxmemory-policy", "allkeys-lru")
    keys = [ResultCache.key(str(number).encode()) for number in range(2000)]
    for first in range(0, len(keys), 250):
        shared.keep(*keys[first : first + 250])
    assert 0 < redis.dbsize() < len(keys)
    assert shared.get(keys[-1])
    redis.config_set("maxmemory-policy", "noeviction")
    redis.config_set("maxmemory", 1)
    shared.cache.put(KEY, RESULT)
    wait_for(lambda: shared.writes("error") == 1, 20)
    assert shared.get(keys[-1]), "a full one still answers"


def test_a_redis_that_hangs_is_soon_not_asked(redis_server: RedisServer) -> None:
    shared = Shared(redis_server.url).wait()
    shared.keep()
    redis_server.process.send_signal(signal.SIGSTOP)
    waits = []
    for _ in range(200):
        started = time.perf_counter()
        assert shared.get() is None
        waits.append(time.perf_counter() - started)
        time.sleep(0.01)
    assert shared.lookups("error") == FAILURES
    assert shared.lookups("skipped") == 200 - FAILURES
    assert sum(wait > 0.002 for wait in waits) <= FAILURES + 5  # other processes take the CPU, too
    assert not shared.cache.describe()["healthy"]
    for _ in range(MAX_WRITES):
        shared.cache.put(KEY, RESULT)
    assert shared.writes("dropped") == MAX_WRITES
    redis_server.process.send_signal(signal.SIGCONT)
    shared.wait()
    assert shared.get()


def test_a_redis_that_was_killed_and_comes_back(redis_server: RedisServer) -> None:
    shared = Shared(redis_server.url).wait()
    shared.keep()
    redis_server.kill()
    for _ in range(10):
        assert shared.get() is None
    assert shared.lookups("error") == FAILURES
    assert shared.cache.describe() == {"healthy": False, "cause": "ConnectionError"}
    redis_server.start()
    shared.wait()
    assert shared.get() is None
    shared.keep()
    assert shared.get()


def test_more_results_than_can_wait_are_dropped(redis_server: RedisServer) -> None:
    shared = Shared(redis_server.url).wait()
    for _ in range(MAX_WRITES * 2):
        shared.cache.put(KEY, RESULT)
    wait_for(lambda: shared.writes("written") >= MAX_WRITES, 20)
    assert shared.writes("written") + shared.writes("dropped") == MAX_WRITES * 2
    assert shared.writes("dropped") > 0


@pytest.mark.parametrize("password", ["", ":wr0ng@"])
def test_a_wrong_password_is_said_without_it(
    redis_server: RedisServer, password: str, caplog: pytest.LogCaptureFixture
) -> None:
    redis_server.client.config_set("requirepass", "right")
    url = redis_server.url.replace("redis://", f"redis://{password}")
    shared = Shared(url)
    wait_for(lambda: "Authentication" in str(shared.cache.describe()["cause"]), 20)
    assert shared.get() is None
    assert shared.lookups("skipped") == 1
    assert "shared_cache_failed" in caplog.text
    assert "wr0ng" not in caplog.text + str(shared.cache.describe())
    assert Shared(url.replace(password or "//", f"{'' if password else '//'}:right@")).wait()


# --- In a worker


Start = Callable[..., ImageClassifier]


@pytest.fixture
def worker(model_dir: Path, isolation: list[object], redis_server: RedisServer) -> Start:
    """Starts workers that are connected."""

    def start_one(folder: Path = model_dir, **settings: Any) -> ImageClassifier:
        classifier = start(folder, cache_url=redis_server.url, **settings)
        shared = classifier.shared
        assert shared
        wait_for(lambda: shared.describe()["healthy"], 20)
        return classifier

    return start_one


def cached(reply: Reply) -> bool:
    return bool(reply.body["metadata"]["cached"])


def keys(redis_server: RedisServer, count: int) -> None:
    wait_for(lambda: redis_server.client.dbsize() == count, 20)


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_an_image_of_another_worker_is_not_computed_again(
    worker: Start, redis_server: RedisServer, cache_bytes: int
) -> None:
    one, other = worker(cache_bytes=cache_bytes), worker(cache_bytes=cache_bytes)
    [first] = ask(one, {"body": JPEG})
    keys(redis_server, 1)
    other.engine = Fake()
    again, new = ask(other, {"body": {"image": b64(JPEG), "top_k": 1}}, {"body": PNG})
    assert [cached(reply) for reply in (first, again, new)] == [False, True, False]
    assert other.engine.batches == [1]
    assert again.body["predictions"] == first.body["predictions"][:1]
    assert again.body["metadata"]["image_size"] == [300, 200]
    redis_server.kill()
    assert cached(ask(other, {"body": JPEG})[0]) is (cache_bytes > 0)


def test_a_health_check_asks_the_model(worker: Start, redis_server: RedisServer) -> None:
    ask(worker(), {"body": JPEG})
    keys(redis_server, 1)
    [reply] = ask(worker(), {"body": JPEG}, headers={"X-Probe": "1"})
    assert not cached(reply)


def test_two_models_with_the_same_image_do_not_mix(
    worker: Start, redis_server: RedisServer
) -> None:
    one = worker()
    other = worker()
    card = replace(one.card, files={"weights.safetensors": "another"})
    scope = scope_of(card, one.engine, one.decoder, one.settings)
    other.shared = SharedCache(one.settings, scope, 3, other.metrics)
    wait_for(lambda: other.shared and other.shared.describe()["healthy"], 20)
    for classifier in (one, other):
        assert not cached(ask(classifier, {"body": JPEG})[0])
    keys(redis_server, 2)
    assert all(cached(ask(classifier, {"body": JPEG})[0]) for classifier in (one, other))


def test_the_scope_has_all_that_changes_an_answer(worker: Start) -> None:
    one = worker()
    scope = scope_of(one.card, one.engine, one.decoder, one.settings)
    assert scope == scope_of(one.card, one.engine, one.decoder, replace(one.settings, top_k=3))
    fast = replace(one.settings, decode="fast")
    card = replace(one.card, labels=("a", "b", "c"))
    others = [
        scope_of(one.card, one.engine, one.decoder, fast),
        scope_of(card, one.engine, one.decoder, one.settings),
        scope_of(one.card, Fake(), one.decoder, one.settings),
    ]
    assert len({scope, *others}) == 4


def test_info_says_whether_it_is_healthy_and_no_address(
    worker: Start, redis_server: RedisServer
) -> None:
    classifier = worker()
    facts = classifier.describe_handle()
    assert facts["shared_cache"] == {"healthy": True, "cause": None}
    redis_server.kill()
    for _ in range(FAILURES):
        ask(classifier, {"body": JPEG})
    failed = classifier.describe_handle()
    assert failed["shared_cache"] == {"healthy": False, "cause": "ConnectionError"}
    assert str(redis_server.port) not in f"{facts} {failed}"


# --- In a server


def test_redis_stopped_and_killed_in_mid_load(
    redis_server: RedisServer, tmp_path: Path, colours: list[str], store: Path
) -> None:
    """Two workers, which are two processes; every image is a new one."""
    env = {"TS_MODEL_STORE": str(store), "CLASSIFIER_CACHE_URL": redis_server.url}
    image = encode(noise((300, 200)), "JPEG")
    with serving(tmp_path, *colours, env=env) as server:
        body = encode(noise((64, 64)), "JPEG")

        def is_cached() -> bool:
            answer = requests.post(server.predictions, data=body, timeout=30).json()
            return bool(answer["metadata"]["cached"])

        def ready() -> int:
            return len(server.log("shared_cache_ready"))

        wait_for(lambda: all(is_cached() for _ in range(8)), 30)  # both workers have it
        with Load(server.predictions, image, clients=2) as load:
            load.wait(50)
            redis_server.process.send_signal(signal.SIGSTOP)
            load.wait(100)
            redis_server.process.send_signal(signal.SIGCONT)
            wait_for(lambda: ready() >= 4, 30)
            redis_server.kill()
            load.wait(100)
            redis_server.start()
            wait_for(lambda: ready() >= 6, 30)
        assert load.failures == []
        seconds = sorted(answer.seconds for answer in load.answers)
        assert seconds[int(len(seconds) * 0.99)] < 1.0
        wait_for(lambda: all(is_cached() for _ in range(8)), 30)
        failed = server.log("shared_cache_failed")
        assert {line["url"] for line in failed} == {redis_server.url}
        assert len(failed) >= 4  # each worker has noticed either
