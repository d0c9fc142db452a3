"""A real Prometheus (Debian's package `prometheus`) beside the real service, both ended always."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import requests
import yaml

from tests.server.colours import make_weights
from tests.server.serving import ROOT, Server, environment, serving

MONITORING = ROOT / "deploy" / "monitoring"


@dataclass
class Prometheus:
    """A running Prometheus that scrapes the service every second."""

    url: str

    def ask(self, path: str, **params: object) -> Any:
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
        deadline = time.monotonic() + seconds
        while not self.query(expr):
            assert time.monotonic() < deadline, f"{expr} has no result"
            time.sleep(0.2)


def binary(name: str) -> str:
    """The path of a program of Debian's package; without it the test is skipped, with a reason."""
    path = shutil.which(name)
    if path is None:
        reason = f"{name} is not installed (apt-get install prometheus)"
        if os.environ.get("REQUIRE_EVERYTHING"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def promtool() -> str:
    return binary("promtool")


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two workers that know three colours, with a cache; packaged before, so all output is log."""
    binary("prometheus")  # before what takes long
    folder = tmp_path_factory.mktemp("service")
    weights, labels = map(str, make_weights(folder))
    options = ("--weights", weights, "--labels", labels, "--workers", "2", "--device", "cpu")
    package = [sys.executable, ROOT / "scripts" / "package.py", *options]
    subprocess.run(package, env=environment(folder), check=True, capture_output=True, timeout=180)
    with serving(folder, *options, env={"CLASSIFIER_CACHE_BYTES": "100000"}) as server:
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
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
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
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                requests.get(f"http://{address}/-/ready", timeout=5).raise_for_status()
                break
            except requests.RequestException:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
        prometheus = Prometheus(f"http://{address}")
        prometheus.wait('up{job="classifier"} == 1')
        yield prometheus
    finally:
        process.kill()
        process.wait()
