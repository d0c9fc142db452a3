"""The real gateway in a process of its own, always ended."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import ROOT
from tests.gateway.upstreams import torchserve_that
from tests.processes import events, free_port, lines_of, wait_for
from tests.server.serving import Server, environment, run_script

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
        """The requests in the log so far, or other events."""
        return events(self.stdout.read_text("utf-8"), event)

    def line(self, request_id: str) -> dict[str, Any]:
        [line] = lines_of([request_id], self.lines)
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

    def listed(port: str) -> str:
        return ",".join(f"127.0.0.1:{server.ports[port]}" for server in servers)

    known = {"upstreams": listed("port"), "management": listed("management-port"), "rate": "0"}
    return variables(**known | more)


def variables(**settings: str) -> dict[str, str]:
    return {f"GATEWAY_{name.upper()}": value for name, value in settings.items()}


def refused(folder: Path, env: dict[str, str]) -> str:
    """What ./scripts/gateway says when it does not start; it must end with 2, on one line."""
    done = run_script("gateway", folder, env=env, timeout=START_SECONDS)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    [line] = done.stderr.splitlines()
    return line


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


@contextmanager
def in_front_of(
    folder: Path, *answers: bytes | None, **settings: str
) -> Iterator[tuple[Gateway, list[str]]]:
    """A gateway, and the addresses of the stand-ins behind it, which give one answer each."""
    with ExitStack() as stack:
        upstreams = [stack.enter_context(torchserve_that(answer)) for answer in answers]
        env = variables(upstreams=",".join(upstreams), **settings)
        yield stack.enter_context(running(folder, env)), upstreams


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
