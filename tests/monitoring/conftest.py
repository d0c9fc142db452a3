"""A real Prometheus (Debian's package `prometheus`) beside the real service, both ended always."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from handler.accounting import SETTLE_SECONDS
from handler.collector import FLUSH_SECONDS, SLOW_FLUSHES
from handler.metrics import LAST_FLUSH
from service.chaos import prometheus as chaos
from service.chaos.prometheus import running_prometheus
from tests import skip
from tests.processes import wait_for
from tests.server.serving import Server, serving


class Prometheus(chaos.Prometheus):
    """A running Prometheus that scrapes the service every second."""

    def value(self, expr: str) -> float:
        """The value of a query that has one."""
        [(_, value)] = self.query(expr)
        return value

    def wait(self, expr: str, seconds: float = 60) -> None:
        """Until a query has a result."""
        wait_for(lambda: self.query(expr), seconds, lambda: f"{expr} has no result")

    def wait_for_counts(self) -> None:
        """Until both workers have handed over what they have counted so far, slow metrics too."""
        whole = time.time() + SETTLE_SECONDS + FLUSH_SECONDS * SLOW_FLUSHES
        self.wait(f"count({LAST_FLUSH} > {whole}) == 2", 60)


def binary(name: str) -> str:
    """The path of a program of Debian's package; without it the test is skipped, with a reason."""
    path = shutil.which(name)
    if path is None:
        skip(f"{name} is not installed (apt-get install prometheus)")
    return path


@pytest.fixture(scope="session")
def promtool() -> str:
    return binary("promtool")


@pytest.fixture(scope="session")
def service(
    tmp_path_factory: pytest.TempPathFactory, colours: list[str], store: Path
) -> Iterator[Server]:
    """Two workers that know three colours, with a cache; packaged before, so all output is log."""
    binary("prometheus")  # before what takes long
    env = {"TS_MODEL_STORE": str(store), "CLASSIFIER_CACHE_BYTES": "100000"}
    with serving(tmp_path_factory.mktemp("service"), *colours, env=env) as server:
        yield server


@pytest.fixture(scope="session")
def prometheus(service: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """With the configuration that is shipped, on other ports and in a second's steps."""
    folder = tmp_path_factory.mktemp("prometheus")
    target = service.metrics.removeprefix("http://")
    with running_prometheus(folder, {"classifier": [target]}, seconds=1) as running:
        yield Prometheus(running.url)
