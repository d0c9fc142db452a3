"""What the gateway counted in the present step of a rollout, from its page of metrics."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import requests

from handler.errors import SetupError
from service.rollout.judgement import Counts
from service.torchserve.management import direct_session

TIMEOUT_SECONDS = 5
LINE = re.compile(r"^gateway_rollout_(\w+)(?:\{([^}]*)\})? (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')
COUNTERS = ("requests", "live", "errors", "rescued", "compared", "disagreements")


@dataclass(frozen=True, kw_only=True)
class Page:
    """The gateway's page at one moment."""

    step: int | None  # 0: no rollout; None: it was started without GATEWAY_ROLLOUT
    counts: Mapping[str, Counts]  # by version
    in_flight: Mapping[str, int]  # requests of clients, by version

    def of(self, version: str) -> Counts:
        return self.counts.get(version, Counts())


def parse(text: str) -> Page:
    """The page that deploy/gateway/rollout.lua prints."""
    step, in_flight = None, dict[str, int]()
    totals: dict[str, dict[str, int]] = {}
    seconds: dict[str, dict[float, int]] = {}
    for name, labelled, value in LINE.findall(text):
        labels = dict(LABEL.findall(labelled))
        version = labels.get("version", "")
        if name == "step":
            step = int(value)
        elif name == "in_flight":
            in_flight[version] = int(value)
        elif name == "seconds_bucket":
            seconds.setdefault(version, {})[float(labels["le"])] = int(value)
        elif name.removesuffix("_total") in COUNTERS:
            totals.setdefault(version, {})[name.removesuffix("_total")] = int(value)
    counts = {
        version: Counts(**numbers, seconds=seconds.get(version, {}))
        for version, numbers in totals.items()
    }
    return Page(step=step, counts=counts, in_flight=in_flight)


def read_page(url: str) -> Page:
    """The page of the gateway at `url`. Raises SetupError, or requests.RequestException."""
    with direct_session() as session:
        # It is on this machine, whatever the name in its certificate.
        answer = session.get(f"{url}/metrics", timeout=TIMEOUT_SECONDS, verify=False)
    if answer.status_code == requests.codes.forbidden:
        raise SetupError("the gateway refuses its /metrics: GATEWAY_METRICS_ALLOW needs 127.0.0.1")
    answer.raise_for_status()
    return parse(answer.text)
