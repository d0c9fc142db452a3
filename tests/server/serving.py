"""The real ./scripts/serve in a process of its own, on free ports, always ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

ROOT = Path(__file__).resolve().parents[2]
SERVE = [sys.executable, str(ROOT / "scripts" / "serve.py")]
READY_SECONDS = 180
STOP_SECONDS = 30


@dataclass
class Server:
    """A running server and what it prints."""

    process: subprocess.Popen[bytes]
    ports: dict[str, int]
    output: Path
    model: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['port']}"

    @property
    def management(self) -> str:
        return f"http://127.0.0.1:{self.ports['management-port']}"

    @property
    def metrics(self) -> str:
        return f"http://127.0.0.1:{self.ports['metrics-port']}"

    @property
    def predictions(self) -> str:
        return f"{self.url}/predictions/{self.model}"

    def describe(self, model: str = "", query: str = "") -> dict[str, Any]:
        url = f"{self.management}/models/{model or self.model}{query}"
        return requests.get(url, timeout=30).json()[0]

    def info(self, model: str = "") -> dict[str, Any]:
        return self.describe(model, "?customized=true")["customizedMetadata"]

    def worker_pids(self) -> set[int]:
        return {worker["pid"] for worker in self.describe()["workers"]}

    def log(self, event: str) -> list[dict[str, Any]]:
        """The JSON lines of one kind so far."""
        lines = [json.loads(line) for line in self.text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def text(self) -> str:
        return self.output.read_text("utf-8", "replace")


def free_ports() -> dict[str, int]:
    """Three ports whose gRPC counterparts, 1010 below, are free as well."""
    ports: dict[str, int] = {}
    with ExitStack() as held:
        while len(ports) < 3:
            with suppress(OSError):
                first = held.enter_context(socket.socket())
                first.bind(("127.0.0.1", 0))
                port = first.getsockname()[1]
                second = held.enter_context(socket.socket())
                second.bind(("127.0.0.1", port - 1010))
                ports[("port", "management-port", "metrics-port")[len(ports)]] = port
    return ports


def environment(folder: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """No network, no weights of the user's, no setting of the user's, archives in `folder`."""
    dropped = ("CLASSIFIER_", "GATEWAY_", "TS_", "PYTHONPATH")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(dropped) and not name.lower().endswith("_proxy")
    }
    offline = {"https_proxy": "http://127.0.0.1:9", "TORCH_HOME": str(folder / "torch")}
    return kept | offline | {"TS_MODEL_STORE": str(folder / "store")} | dict(extra or {})


@contextmanager
def serving(
    folder: Path,
    *options: str,
    model: str = "mobilenet_v2",
    env: Mapping[str, str] | None = None,
    under: Sequence[str] = (),
) -> Iterator[Server]:
    """Start ./scripts/serve, wait for its banner, and end all its processes afterwards.

    `under` is a command that executes the one that follows it, such as nice.
    """
    ports = free_ports()
    command = [*under, *SERVE, *options]
    for name, port in ports.items():
        command += [f"--{name}", str(port)]
    output = folder / "output.log"
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment(folder, env)
        )
    server = Server(process, ports, output, model)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while "Ready after" not in server.text():
            assert process.poll() is None, f"ended with {process.returncode}:\n{server.text()}"
            assert time.monotonic() < deadline, f"not ready in time:\n{server.text()}"
            time.sleep(0.1)
        yield server
    finally:
        process = server.process  # a test may have started another in its place
        started: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        finally:
            for child in (process, *started):
                with suppress(psutil.NoSuchProcess):
                    child.kill()


def run_serve(
    folder: Path, *options: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """./scripts/serve where it is expected to end by itself."""
    return subprocess.run(
        [*SERVE, *options],
        capture_output=True,
        text=True,
        timeout=READY_SECONDS,
        env=environment(folder, env),
        check=False,
    )
