import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from handler.errors import SetupError
from service.gateway.process import find_nginx
from tests.processes import free_port
from tests.server.serving import Server, serving


@pytest.fixture(scope="session", autouse=True)
def nginx() -> str:
    """The real one; without it there is nothing to test."""
    try:
        return find_nginx()[0]
    except SetupError as exc:
        if os.environ.get("REQUIRE_EVERYTHING"):
            pytest.fail(str(exc))
        pytest.skip(str(exc))


@dataclass
class Served:
    """A gateway that ./scripts/serve has started, and its one TorchServe."""

    url: str
    server: Server


@pytest.fixture(scope="session")
def gateway(
    tmp_path_factory: pytest.TempPathFactory, nginx: str, colours: list[str], store: Path
) -> Iterator[Served]:
    """./scripts/serve --gateway with its defaults, but no rate limit: tests are fast clients."""
    port = free_port()
    env = {"TS_MODEL_STORE": str(store), "GATEWAY_RATE": "0"}
    options = [*colours, "--gateway", "--gateway-port", str(port)]
    with serving(tmp_path_factory.mktemp("served"), *options, env=env) as server:
        yield Served(f"http://127.0.0.1:{port}", server)
