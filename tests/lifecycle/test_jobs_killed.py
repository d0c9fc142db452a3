"""A job outlives kill -9 of its worker, of Redis, of TorchServe and of the gateway: all real.

JOBS_IMAGES=1000 makes it a long one.
"""

import os
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from service.gateway.process import find_nginx
from tests import skip
from tests.gateway.running import kill, running, settings
from tests.lifecycle.conftest import RedisServer
from tests.lifecycle.jobs import Jobs, worker_of
from tests.processes import alive, wait_for
from tests.server.colours import LABELS, encoded
from tests.server.serving import Server, serving

IMAGES = int(os.environ.get("JOBS_IMAGES", "100"))
SECONDS = 120 + IMAGES


@pytest.fixture
def server(tmp_path: Path, colours: list[str], store: Path) -> Iterator[Server]:
    with serving(tmp_path, *colours, env={"TS_MODEL_STORE": str(store)}) as server:
        yield server


@pytest.fixture
def lasting_redis(tmp_path: Path) -> Iterator[RedisServer]:
    if shutil.which("redis-server") is None:
        skip("redis-server is not installed")
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(folder, lasting=True)
    server.start()
    yield server
    server.kill()


def test_a_job_outlives_everything(
    tmp_path: Path, server: Server, lasting_redis: RedisServer
) -> None:
    find_nginx()
    labels = [random.Random(i).choice(list(LABELS)) for i in range(IMAGES)]
    pictures = {label: encoded(label, size=(64, 48)) for label in LABELS}
    more = {"jobs_url": lasting_redis.url, "jobs_folder": str(tmp_path / "jobs")}
    env = settings([server], models=server.model, **more)
    with ExitStack() as stack:
        gateway = stack.enter_context(running(tmp_path, env))
        jobs = Jobs(gateway.url)
        job = jobs.post(*(pictures[label] for label in labels))

        def wait_until_done(share: float) -> None:
            def has() -> bool:
                answer = jobs.ask("GET", f"/jobs/{job['id']}")
                return answer.status_code == 200 and answer.json()["done"] >= share * IMAGES

            wait_for(has, SECONDS, gateway.stdout.read_text)

        wait_until_done(0.05)
        worker = worker_of(gateway)
        worker.kill()
        wait_for(lambda: not alive([worker]))

        wait_until_done(0.25)
        lasting_redis.kill()
        assert jobs.ask("GET", f"/jobs/{job['id']}").status_code == 503
        lasting_redis.start()

        wait_until_done(0.5)
        server.java().send_signal(signal.SIGKILL)
        kill(gateway.process.pid)
        server.process.wait(60)
        server.start()
        gateway = stack.enter_context(running(tmp_path, env))
        jobs = Jobs(gateway.url)

        ended = jobs.wait(job, SECONDS)
        assert (ended["state"], ended["done"], ended["failed"]) == ("done", IMAGES, 0)
        lines = jobs.results(job)
        again = [line for line in gateway.lines() if line["client"] == "(jobs)"]
        assert len(again) >= IMAGES // 10  # it was in the middle of the job
    assert [line["index"] for line in lines] == list(range(IMAGES))
    assert [line["name"] for line in lines] == [f"{i}.jpg" for i in range(IMAGES)]
    assert [line["answer"]["predictions"][0]["class"] for line in lines] == labels
