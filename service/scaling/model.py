"""A running model as scaling sees it: its state, what it has done so far, and its size."""

import re
import time
from dataclasses import dataclass
from threading import Event

from handler.metrics import BUSY, PROBES, REQUESTS, STAGE
from service.torchserve.management import Management, ModelState, direct_session

COUNTERS = {  # on the metrics page -> the field of Counters that it counts for
    "ts_inference_requests_total": "requests",
    "ts_queue_latency_microseconds": "queue_us",
    "ts_inference_latency_microseconds": "latency_us",
    BUSY: "busy_seconds",
    REQUESTS: "handled",
    PROBES: "handled",
    f"{STAGE}_sum": "own_seconds",
    f"{STAGE}_count": "own_count",
}
SAMPLE = re.compile(r"^(\w+)\{(.*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')
QUIET_SECONDS = (0.1, 1.0)  # bounds of the pause that shows that no request is in hand


@dataclass(frozen=True)
class Counters:
    """Sums since the start of the server."""

    requests: float  # that arrived, refused ones included
    queue_us: float  # time that answered requests waited for a worker
    latency_us: float  # time until they were answered, in the queue included
    # What follows comes from the workers, every five seconds; 0 of other handlers than ours.
    busy_seconds: float = 0  # time that workers spent on batches
    handled: float = 0  # requests that they answered
    own_seconds: float = 0  # time of the batch, of each request but health checks
    own_count: float = 0  # how many these are


@dataclass(frozen=True)
class Model:
    """A model of a running server. Every method raises requests.RequestException."""

    management: Management
    metrics: str  # http://HOST:PORT
    name: str
    version: str | None = None  # None: the default version

    @property
    def _target(self) -> str:
        return f"{self.name}/{self.version}" if self.version else self.name

    def describe(self) -> ModelState:
        """The model's state. Raises UnknownModel."""
        return self.management.describe(self._target)

    def resize(self, workers: int) -> None:
        """Ask for a number of workers, which are there later."""
        self.management.resize(self._target, workers)

    def find_labels(self, version: str) -> set[str]:
        """The labels of the counters of `version`, which describe() gave.

        A counter is labelled with the version if a request named it, and with "default" if not.
        """
        if self.version is not None:
            default = self.management.describe(self.name)
            if version != default.version:
                return {version}
        return {version, "default"}

    def read_counters(self, labels: set[str]) -> Counters:
        """The sums over some labels, from the metrics page."""
        with direct_session() as session:
            page = session.get(f"{self.metrics}/metrics", timeout=self.management.timeout)
        page.raise_for_status()
        return parse_counters(page.text, self.name, labels)

    def wait_until_quiet(self, seconds: float, stop: Event) -> bool:
        """Whether within `seconds`, and before `stop`, no request was in hand for a moment.

        TorchServe does not say what its workers have in hand. It counts what comes in: if nothing
        has come for several times as long as a request takes, and none waits, all are answered.
        """
        deadline = time.monotonic() + seconds
        labels = self.find_labels(self.describe().version)
        before = self.read_counters(labels)
        low, high = QUIET_SECONDS
        mean = (before.latency_us - before.queue_us) / 1e6 / max(1, before.requests)
        while not stop.wait(min(high, max(low, 4 * mean))):
            after = self.read_counters(labels)
            if after == before and self.describe().pending == 0:
                return True
            if time.monotonic() > deadline:
                return False
            before = after
        return False


def parse_counters(page: str, model: str, versions: set[str]) -> Counters:
    """A model's counters on the metrics page, summed over the labels of some versions."""
    sums = dict.fromkeys(COUNTERS.values(), 0.0)
    for name, text, value in SAMPLE.findall(page):
        if name not in COUNTERS:
            continue
        labels = dict(LABEL.findall(text))
        if name.startswith("ts_"):  # TorchServe's own
            labels = {"model": labels["model_name"], "version": labels["model_version"]}
        whole = labels.get("stage", "total") == "total"  # of the stages only the one of all
        if labels["model"] == model and labels["version"] in versions and whole:
            sums[COUNTERS[name]] += float(value)
    return Counters(**sums)
