"""The real ./scripts/serve in a process of its own, on free ports, always ended."""

import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import Any
from zipfile import ZipFile

import psutil
import requests

from handler.model_card import CARD_FILE, ModelCard
from service.archive.mar import seal
from tests import ROOT
from tests.processes import events, free_ports, lines_of, wait_for

SERVE = [sys.executable, str(ROOT / "scripts" / "serve.py")]
READY_SECONDS = 180
STOP_SECONDS = 30


@dataclass
class Server:
    """./scripts/serve, where it listens, and what it prints."""

    command: list[str]
    env: dict[str, str]
    ports: dict[str, int]
    output: Path
    model: str
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        """Return once it is ready. A server that has ended can be started again."""
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                self.command, stdout=file, stderr=subprocess.STDOUT, env=self.env
            )
        wait_for(self._is_ready, READY_SECONDS, self.text)

    def _is_ready(self) -> bool:
        if "Ready after" in self.text():
            return True
        assert self.process.poll() is None, f"ended with {self.process.poll()}:\n{self.text()}"
        return False

    def end(self) -> None:
        """Stop it, and kill what is left of it."""
        started: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        finally:
            self.process.kill()
            for child in started:
                with suppress(psutil.NoSuchProcess):
                    child.kill()

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

    def statuses(self) -> list[str]:
        """Those of its workers."""
        return [worker["status"] for worker in self.describe()["workers"]]

    def worker_pids(self) -> set[int]:
        return {worker["pid"] for worker in self.describe()["workers"]}

    def log(self, event: str) -> list[dict[str, Any]]:
        """The JSON lines of one kind so far."""
        return events(self.text(), event)

    def request_line(self, request_id: str) -> dict[str, Any]:
        [line] = self.request_lines([request_id])
        return line

    def request_lines(self, request_ids: Collection[str]) -> list[dict[str, Any]]:
        return lines_of(request_ids, lambda: self.log("request"))

    def java(self) -> psutil.Process:
        """TorchServe's own process."""
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if child.name() == "java")

    def text(self) -> str:
        return self.output.read_text("utf-8", "replace")


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


def port_options(ports: Mapping[str, int]) -> list[str]:
    return [f"--{name}={port}" for name, port in ports.items()]


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
    command = [*under, *SERVE, *options, *port_options(ports)]
    server = Server(command, environment(folder, env), ports, folder / "output.log", model)
    try:
        server.start()
        yield server
    finally:
        server.end()


def run_script(
    name: str,
    folder: Path,
    *argv: str,
    env: Mapping[str, str] | None = None,
    timeout: float = READY_SECONDS,
) -> subprocess.CompletedProcess[str]:
    """A command of scripts/ that ends by itself."""
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / f"{name}.py", *argv],
        env=environment(folder, env),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def package(folder: Path, *options: str, env: Mapping[str, str] | None = None) -> None:
    """Make the archive that ./scripts/serve is then asked for."""
    done = run_script("package", folder, *options, env=env, timeout=300)
    assert done.returncode == 0, done.stderr


def copy_changed(store: Path, folder: Path, more: Mapping[str, str]) -> None:
    """Copy archives to where serving(folder) looks for them, with more at the end of some files."""
    (folder / "store").mkdir()
    for path in store.glob("*.mar"):
        with ZipFile(path) as old, ZipFile(folder / "store" / path.name, "w") as new:
            for item in old.infolist():
                if item.filename != CARD_FILE:
                    new.writestr(item, old.read(item) + more.get(item.filename, "").encode())
            card = ModelCard.from_json(old.read(CARD_FILE))
        seal(folder / "store" / path.name, card)


def copy_with_engine(store: Path, folder: Path, change: str, more: Mapping[str, str] = {}) -> None:
    """Copy archives likewise; `change` is the body of a function that plays with the engine."""
    played = f"""

import os
import time

_load_engine = load_engine


def load_engine(*args, **kwargs):
    engine = _load_engine(*args, **kwargs)
{indent(change, "    ")}
    return engine
"""
    copy_changed(store, folder, {"handler/engines.py": played, **more})
