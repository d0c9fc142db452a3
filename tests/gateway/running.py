"""The real gateway in a process of its own, always ended, and clients that load it."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from tests import ROOT
from tests.processes import free_port, wait_for
from tests.server.serving import Server, environment

COMMAND = [sys.executable, str(ROOT / "scripts" / "gateway.py")]
START_SECONDS = 30
STOP_SECONDS = 60


@dataclass
class Gateway:
    """A running gateway and what it prints: the log on stdout, the rest on stderr."""

    process: subprocess.Popen[bytes]
    port: int
    stdout: Path
    stderr: Path
    scheme: str = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def lines(self, event: str = "gateway") -> list[dict[str, Any]]:
        """The requests in the log so far, or other events; no line that is being written."""
        text = self.stdout.read_text("utf-8")
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]
        return [line for line in lines if line["event"] == event]

    def line(self, request_id: str) -> dict[str, Any]:
        """The line of one request, which is written when its answer has been sent."""

        def lines() -> list[dict[str, Any]]:
            return [line for line in self.lines() if line["request_id"] == request_id]

        wait_for(lines, 10, lambda: f"no line of {request_id} in the log")
        [line] = lines()
        return line

    def has_started(self) -> bool:
        said = self.stderr.read_text()
        assert self.process.poll() is None, said
        return "Gateway on" in said

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)


def settings(servers: Sequence[Server], **more: str) -> dict[str, str]:
    """GATEWAY_ variables for these TorchServes; without a rate limit, unless one is given."""
    return {
        "GATEWAY_UPSTREAMS": ",".join(f"127.0.0.1:{server.ports['port']}" for server in servers),
        "GATEWAY_MANAGEMENT": ",".join(
            f"127.0.0.1:{server.ports['management-port']}" for server in servers
        ),
        "GATEWAY_RATE": "0",
    } | {f"GATEWAY_{name.upper()}": value for name, value in more.items()}


def refused(folder: Path, env: dict[str, str], *options: str) -> str:
    """What ./scripts/gateway says when it does not start; it must end with 2, on one line."""
    done = subprocess.run(
        [*COMMAND, *options],
        env=environment(folder, env),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert not done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@contextmanager
def running(folder: Path, env: dict[str, str], scheme: str = "http") -> Iterator[Gateway]:
    """Start ./scripts/gateway, wait until it listens, and end it afterwards."""
    port = int(env.get("GATEWAY_PORT", free_port()))
    paths = folder / f"gateway-{port}.out", folder / f"gateway-{port}.err"
    with paths[0].open("wb") as stdout, paths[1].open("wb") as stderr:
        process = subprocess.Popen(
            COMMAND,
            env=environment(folder, env | {"GATEWAY_PORT": str(port)}),
            stdout=stdout,
            stderr=stderr,
        )
    gateway = Gateway(process, port, *paths, scheme)
    try:
        wait_for(gateway.has_started, START_SECONDS, gateway.stderr.read_text)
        yield gateway
    finally:
        if process.poll() is None:
            gateway.stop()
        process.kill()


@dataclass
class Load:
    """Clients that send one request after another, until they are told to stop."""

    url: str
    body: bytes
    clients: int = 8
    pause: float = 0.0  # seconds between two requests of a client; may change while they ask
    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    answered: set[str] = field(default_factory=set)  # ids
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> "Load":
        self._threads = [threading.Thread(target=self._ask) for _ in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for thread in self._threads:
            thread.join()

    def wait(self, count: int, seconds: float = 240) -> None:
        """Until so many requests have ended, well or not."""
        wait_for(lambda: self.total >= count, seconds, lambda: f"{self.total} of {count} in time")

    @property
    def total(self) -> int:
        return self.statuses.total() + len(self.failures)

    def _ask(self) -> None:
        with requests.Session() as session:
            session.trust_env = False
            while not self.ended.wait(self.pause):
                try:
                    answer = session.post(self.url, data=self.body, timeout=60)
                except requests.RequestException as exc:
                    with self.lock:
                        self.failures.append(repr(exc))
                    if not isinstance(exc, requests.Timeout):
                        self.ended.wait(0.05)
                    continue
                with self.lock:
                    self.statuses[answer.status_code] += 1
                    self.answered.add(answer.headers["X-Request-ID"])
                    if answer.status_code != 200 and len(self.failures) < 100:
                        self.failures.append(answer.text[:300])


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
