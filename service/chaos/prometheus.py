"""A real Prometheus with the rules and alerts of deploy/monitoring."""

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import requests
import yaml

from handler.errors import SetupError
from service.chaos.history import Alert
from service.ports import free_ports
from service.processes import Guardian, wait_until
from service.torchserve.config import ROOT
from service.torchserve.management import direct_session

MONITORING = ROOT / "deploy" / "monitoring"
READY_SECONDS = 60
MAX_POINTS = 10_000  # of a series in one answer, a little less than Prometheus allows


class Prometheus:
    """What runs at `url`, asked over HTTP."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, **params: str | float) -> Any:
        """The data of an answer of the HTTP API. Raises requests.RequestException."""
        with direct_session() as session:
            response = session.get(f"{self.url}/api/v1/{path}", params=params, timeout=30)
        response.raise_for_status()
        return response.json()["data"]

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series of an instant query."""
        found = self.ask("query", query=expr)["result"]
        return [(series["metric"], float(series["value"][1])) for series in found]

    def alerts(self, begin: float, end: float) -> Iterator[Alert]:
        """What was pending or firing, and when, in Unix time."""
        step = max(1, round((end - begin) / MAX_POINTS))
        found = self.ask("query_range", query="ALERTS", start=begin, end=end, step=step)
        for series in found["result"]:
            labels, times = series["metric"], [time for time, _ in series["values"]]
            begins = [time for time in times if time - step not in times]
            ends = [time for time in times if time + step not in times]
            for first, last in zip(begins, ends, strict=True):
                yield Alert(
                    alert=labels["alertname"],
                    state=labels["alertstate"],
                    instance=labels.get("instance", ""),
                    begin=first,
                    end=last,
                )


def write_targets(folder: Path, job: str, targets: Sequence[str]) -> None:
    """Change the addresses of a job; the Prometheus of that folder sees it at once."""
    new = folder / f"{job}.new"
    new.write_text(json.dumps([{"targets": list(targets)}]), "utf-8")
    new.replace(folder / f"{job}.json")


@contextmanager
def running_prometheus(
    folder: Path, targets: Mapping[str, Sequence[str]], seconds: int
) -> Iterator[Prometheus]:
    """Scrape the addresses of each job every so many seconds; evaluate the rules every second.

    The rest of the configuration is the one that is shipped. Raises SetupError.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise SetupError("prometheus is not installed: apt-get install prometheus")
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text("utf-8"))
    config["global"] = {"scrape_interval": f"{seconds}s", "evaluation_interval": "1s"}
    config["global"]["scrape_timeout"] = f"{seconds}s"
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    for scrape in config["scrape_configs"]:
        job = scrape["job_name"]
        write_targets(folder, job, targets.get(job, ()))
        scrape.pop("static_configs", None)
        scrape["file_sd_configs"] = [{"files": [str(folder / f"{job}.json")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), "utf-8")
    address = f"127.0.0.1:{free_ports(1)[0]}"
    command = [
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    prometheus = Prometheus(f"http://{address}")

    def is_ready() -> bool:
        with suppress(requests.RequestException):
            return len(prometheus.query("up == 1")) == sum(map(len, targets.values()))
        return False

    log = folder / "prometheus.log"
    with log.open("wb") as file, Guardian() as guardian:
        guardian.start(command, stdout=file, stderr=subprocess.STDOUT)
        if not wait_until(is_ready, READY_SECONDS):
            last = (log.read_text("utf-8", "replace").splitlines() or ["it said nothing"])[-1]
            raise SetupError(f"Prometheus does not see the service: {last}")
        yield prometheus
