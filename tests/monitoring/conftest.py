"""A real Prometheus (Debian's package `prometheus`) beside the real service, both ended always."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from handler.accounting import SETTLE_SECONDS
from handler.metrics import FLUSH_SECONDS, LAST_FLUSH, SLOW_FLUSHES
from tests import ROOT, skip
from tests.processes import free_port, wait_for
from tests.server.serving import Server, serving

MONITORING = ROOT / "deploy" / "monitoring"


@dataclass
class Prometheus:
    """A running Prometheus that scrapes the service every second."""

    url: str

    def ask(self, path: str, **params: str | float) -> Any:
        response = requests.get(f"{self.url}/api/v1/{path}", params=params, timeout=30)
        assert response.status_code == 200, (params, response.text)
        return response.json()["data"]

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series of an instant query."""
        found = self.ask("query", query=expr)["result"]
        return [(series["metric"], float(series["value"][1])) for series in found]

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
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    [scrape] = config["scrape_configs"]
    scrape["static_configs"] = [{"targets": [service.metrics.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                binary("prometheus"),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    prometheus = Prometheus(f"http://{address}")

    def is_ready() -> bool:
        with suppress(requests.ConnectionError):
            return requests.get(f"{prometheus.url}/-/ready", timeout=5).ok
        return False

    try:
        wait_for(is_ready, 60, (folder / "log").read_text)
        prometheus.wait('up{job="classifier"} == 1')
        yield prometheus
    finally:
        process.kill()
        process.wait()
