import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from handler.errors import SetupError
from service.gateway.process import find_nginx
from tests import skip
from tests.processes import free_port
from tests.server.serving import Server, serving


@pytest.fixture(scope="session", autouse=True)
def nginx() -> None:
    """The real one; without it there is nothing to test."""
    try:
        find_nginx()
    except SetupError as exc:
        skip(str(exc))


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A TMPDIR for the gateway, with a short path for sockets.

    nginx's workers, who are nobody's if we are root, get to it; to tmp_path they do not.
    """
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@dataclass
class Served:
    """A gateway that ./scripts/serve has started, and its one TorchServe."""

    port: int
    server: Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving_with_gateway(
    folder: Path, colours: list[str], store: Path, under: Sequence[str] = (), **env: str
) -> Iterator[Served]:
    """./scripts/serve --gateway with its defaults, but no rate limit: tests are fast clients."""
    port = free_port()
    env = {"TS_MODEL_STORE": str(store), "GATEWAY_RATE": "0"} | env
    options = [*colours, "--gateway", f"--gateway-port={port}"]
    with serving(folder, *options, env=env, under=under) as server:
        yield Served(port, server)


@pytest.fixture(scope="session")
def gateway(
    tmp_path_factory: pytest.TempPathFactory, nginx: None, colours: list[str], store: Path
) -> Iterator[Served]:
    with serving_with_gateway(tmp_path_factory.mktemp("served"), colours, store) as served:
        yield served
