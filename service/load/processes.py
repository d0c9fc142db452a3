"""Servers as processes: started, awaited, found with all their children, measured, and ended."""

import json
import random
import re
import socket
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from service import processes
from service.processes import Guardian, wait_until

MARKER = "BENCHMARK_SERVER"  # inherited by whatever a server starts, daemons included
STOP_SECONDS = 20


class NotReady(Exception):
    """A server did not become ready; the message says why."""


@dataclass(frozen=True)
class Server:
    """A started command; `log` is the file with everything that it prints."""

    process: subprocess.Popen[bytes]
    marker: str
    log: Path

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def family(self) -> list[psutil.Process]:
        """Every process of the server: its descendants, and those that carry its marker."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARKER) == self.marker:
                    found[process.pid] = process
        with suppress(psutil.Error):
            root = psutil.Process(self.process.pid)
            found[root.pid] = root
        for process in list(found.values()):
            with suppress(psutil.Error):
                found.update({child.pid: child for child in process.children(recursive=True)})
        return list(found.values())

    def events(self, event: str) -> list[dict[str, Any]]:
        """See read_events."""
        return read_events(self.log.read_text("utf-8", "replace"), event)

    def wait_until_ready(self, seconds: float) -> None:
        """Return when ./scripts/serve logs that it is ready. Raises NotReady."""
        if not wait_until(lambda: self.events("ready") or self.has_ended(), seconds):
            raise NotReady(f"not ready within {seconds:g} s")
        if not self.events("ready"):
            reasons = [line["message"] for line in self.events("startup_failed")]
            raise NotReady(reasons[0] if reasons else self.last_lines().removeprefix("error: "))

    def last_lines(self) -> str:
        """What a failed server said last, on one line."""
        lines = self.log.read_text("utf-8", "replace").split("\n")
        errors = [line for line in lines if re.match(r"\s*(\w+\.)*(error|\w*Error\b|error:)", line)]
        said = [line.strip() for line in errors or lines if line.strip()]
        return said[-1][:300] if said else "it said nothing"


def read_events(log: str, event: str) -> list[dict[str, Any]]:
    """The complete lines of one event in a JSON log of ./scripts/serve."""
    complete = log.rpartition("\n")[0].splitlines()
    mark = f'"event": "{event}"'
    return [json.loads(line) for line in complete if line.startswith("{") and mark in line]


@contextmanager
def running(
    command: Sequence[object], environ: Mapping[str, str], folder: Path
) -> Iterator[Server]:
    """Start a command in `folder`, and end all its processes afterwards."""
    marker = uuid.uuid4().hex
    log = folder / "output.log"
    guardian = Guardian()
    with log.open("wb") as file:
        process = guardian.start(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**environ, MARKER: marker},
            cwd=folder,
        )
    server = Server(process, marker, log)
    try:
        yield server
    finally:
        end(server)
        guardian.dismiss()


def end(server: Server) -> None:
    """SIGTERM to the command, then SIGKILL to whatever is left of its family."""
    family = server.family()
    processes.end(server.process, STOP_SECONDS)
    family += server.family()
    for process in family:
        # psutil compares start times, so a process that has taken over a PID is left alone
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(family, timeout=5)


def free_base_port() -> int:
    """A port that is free with the three above it, and with TorchServe's gRPC ports 1010 below.

    TorchServe listens there, or on those above it if the port itself is a gateway's.
    """
    for _ in range(200):
        base = random.randint(20_000, 30_000)  # noqa: S311 no secret
        with ExitStack() as held, suppress(OSError):
            for offset in (0, 1, 2, 3, -1010, -1009, -1008):
                probe = held.enter_context(socket.socket())
                probe.bind(("127.0.0.1", base + offset))
            return base
    raise OSError("no free ports")
