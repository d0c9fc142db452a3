"""A gateway with jobs in front of a stand-in for TorchServe, and what clients do with jobs."""

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import psutil
import requests
from redis.asyncio import Redis

from service.jobs.store import Store
from tests.gateway.running import Gateway, running, variables
from tests.lifecycle.conftest import RedisServer
from tests.processes import wait_for

TIMEOUT = 30
T = TypeVar("T")
KEYS = {"alice": "a" * 20, "bob": "b" * 20}


@dataclass
class Other:
    """A server that notes what it is sent: TorchServe, images by URL, or who waits for webhooks.

    Whether it lives, a gateway asks whenever it likes: that is not noted, and the answer is 200.
    """

    port: int = 0
    statuses: list[int] = field(default_factory=list)  # of the next answers; then 200
    bodies: list[bytes] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    held: threading.Event = field(default_factory=threading.Event)  # holds bodies "held"
    seconds: float = 0.0

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        status = 200
        if request.path != "/ping" and "X-Probe" not in request.headers:
            status = self._note(request, body)
        answer = body_at(request.path) if request.command == "GET" else answer_to(body)
        request.send_response(status)
        request.send_header("X-Model-Version", "1.0")
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(answer)))
        if status == 302:
            request.send_header("Location", f"http://127.0.0.1:{self.port}/images/elsewhere")
        request.end_headers()
        request.wfile.write(answer)

    def _note(self, request: BaseHTTPRequestHandler, body: bytes) -> int:
        """Keep what was sent, and take as long as it should; gives the status of the answer."""
        self.bodies.append(body)
        self.paths.append(request.path)
        self.headers.append({name.lower(): text for name, text in request.headers.items()})
        time.sleep(self.seconds)
        if body == b"held":
            self.held.wait(TIMEOUT)
        return self.statuses.pop(0) if self.statuses else 200


def body_at(path: str) -> bytes:
    return f"image at {path}".encode()


def answer_to(body: bytes) -> bytes:
    """What the stand-in says of an image."""
    return json.dumps({"status": "success", "sha256": hashlib.sha256(body).hexdigest()}).encode()


@contextmanager
def other() -> Iterator[Other]:
    known = Other()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            known.answer(self)

        do_GET = do_POST  # noqa: N815 - the name is http.server's

        def log_message(self, *args: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        known.port = server.server_port
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield known
        finally:
            known.held.set()
            server.shutdown()
            thread.join()


@dataclass
class Jobs:
    """A client of /jobs."""

    url: str
    key: str = ""

    def ask(self, method: str, path: str = "/jobs", **options: Any) -> requests.Response:
        headers = {"X-API-Key": self.key} if self.key else {}
        headers |= options.pop("headers", {})
        return requests.request(
            method, f"{self.url}{path}", headers=headers, timeout=TIMEOUT, **options
        )

    def post(self, *images: bytes, **options: Any) -> dict[str, Any]:
        """A new job, of images in a form unless `options` have something else."""
        if images:
            options["files"] = form(*images)
        answer = self.ask("POST", **options)
        assert answer.status_code == 202, answer.text
        job = answer.json()
        assert answer.headers["Location"] == f"/jobs/{job['id']}"
        return job

    def get(self, job: dict[str, Any]) -> dict[str, Any]:
        answer = self.ask("GET", f"/jobs/{job['id']}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait(self, job: dict[str, Any], seconds: float = TIMEOUT) -> dict[str, Any]:
        """The job once it has ended, however it is asked for meanwhile."""
        found: dict[str, Any] = {}

        def has_ended() -> bool:
            answer = self.ask("GET", f"/jobs/{job['id']}")
            if answer.status_code == 200:
                found.update(answer.json())
            return bool(found.get("finished"))

        wait_for(has_ended, seconds, lambda: found)
        return found

    def results(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        answer = self.ask("GET", job["results"])
        assert answer.headers["Content-Type"] == "application/x-ndjson"
        return [json.loads(line) for line in answer.text.splitlines()]


def form(*images: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", (f"{i}.jpg", image)) for i, image in enumerate(images)]


def numbered(count: int) -> list[bytes]:
    """Different images."""
    return [f"image {i}".encode() for i in range(count)]


@dataclass
class Served:
    """A gateway with jobs, and what is behind and beside it."""

    gateway: Gateway
    torchserve: Other
    folder: Path  # of the jobs

    @property
    def alice(self) -> Jobs:
        return Jobs(self.gateway.url, KEYS["alice"])

    @property
    def bob(self) -> Jobs:
        return Jobs(self.gateway.url, KEYS["bob"])


@contextmanager
def serving_jobs(folder: Path, redis: RedisServer, **settings: str) -> Iterator[Served]:
    keys = folder / "keys"
    digests = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
    keys.write_text("".join(f"{name} {digest}\n" for name, digest in digests.items()))
    with other() as torchserve:
        address = f"127.0.0.1:{torchserve.port}"
        known = {"upstreams": address, "management": address, "models": "m", "rate": "0"}
        known |= {"keys": str(keys), "jobs_url": redis.url, "jobs_folder": str(folder / "jobs")}
        with running(folder, variables(**known | settings)) as gateway:
            yield Served(gateway, torchserve, folder / "jobs")


def worker_of(gateway: Gateway) -> psutil.Process:
    """The process that works on jobs."""
    children = psutil.Process(gateway.process.pid).children()
    return next(child for child in children if "service.jobs.server" in " ".join(child.cmdline()))


def with_store(server: RedisServer, folder: Path, action: Callable[[Store], Awaitable[T]]) -> T:
    """Do something with a Store, in an event loop of its own."""

    async def do() -> T:
        client = Redis.from_url(server.url, decode_responses=True)
        async with client:
            return await action(Store(client, folder, 60))

    return asyncio.run(do())
