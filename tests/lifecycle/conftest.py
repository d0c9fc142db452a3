"""Real Redis, on a free port of loopback, in a folder of its own, always ended."""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from redis import ConnectionError, Redis

from tests import skip
from tests.processes import free_port, wait_for
from tests.unit.handler.conftest import isolation, model_dir

__all__ = ["isolation", "model_dir"]  # fixtures

START_SECONDS = 20


@dataclass
class RedisServer:
    """A redis-server; `lasting` is one that writes its log to the disk once a second."""

    folder: Path
    lasting: bool = False
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] = field(init=False)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def client(self) -> Redis:
        return Redis.from_url(self.url)

    def start(self, *options: str) -> None:
        """Return once it answers. One that has ended can be started again.

        Unless it is lasting, it is empty then.
        """
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--save", "", "--dir", str(self.folder), *options]
        if self.lasting:
            command += ["--appendonly", "yes", "--appendfsync", "everysec"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_for(self._answers, START_SECONDS, lambda: f"redis-server: {self.process.poll()}")

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except ConnectionError:
            return False

    def kill(self) -> None:
        self.process.kill()  # also one that is stopped
        self.process.wait()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    if shutil.which("redis-server") is None:
        skip("redis-server is not installed")
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()
