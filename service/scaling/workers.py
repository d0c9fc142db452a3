"""The workers of a running model: who they are, what they take, how to have more or fewer."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import quote

import requests

from handler.machine import available_memory
from service import health as healthcheck

PROC = Path("/proc")
TIMEOUT_SECONDS = 10  # a frontend under load answers late
SAMPLE = re.compile(r"^(ts_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')
QUIET_SECONDS = (0.1, 1.0)  # bounds of the pause that shows that no request is in hand


class UnknownModel(Exception):
    """TorchServe runs, and the model is not registered there."""


@dataclass(frozen=True)
class Worker:
    """One process of a model."""

    id: str
    pid: int
    device: str  # "cpu", "cuda:0", or "cuda" where TorchServe cannot tell which
    status: str  # READY, UNLOADING (which is also: loading)
    memory: int | None  # bytes; None where the process is not on this machine


@dataclass(frozen=True)
class State:
    """A model as TorchServe describes it."""

    version: str
    wanted: int  # workers that there should be
    workers: list[Worker]
    pending: int  # requests that wait for a worker
    remaining: int  # requests that can still wait

    @property
    def ready(self) -> int:
        return sum(worker.status == "READY" for worker in self.workers)


@dataclass(frozen=True)
class Counters:
    """Sums since the start of the server."""

    requests: float
    queue_us: float  # time that answered requests waited for a worker
    latency_us: float  # the same, and until they were answered


@dataclass(frozen=True)
class Space:
    """Memory of one kind: what a worker takes of it, and what is free."""

    name: str  # "memory", "memory of GPU 0"
    each: int  # bytes
    free: int  # bytes

    def __str__(self) -> str:
        return f"{self.name}: a worker takes {mebibytes(self.each)}, {mebibytes(self.free)} free"


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


@dataclass(frozen=True)
class Model:
    """A model of a running server; every method raises requests.RequestException."""

    management: str
    metrics: str
    name: str
    version: str | None = None  # None: the default version

    def describe(self) -> State:
        """What TorchServe says now. Raises UnknownModel."""
        try:
            answer = healthcheck.describe(self.management, self._path, timeout=TIMEOUT_SECONDS)
            if answer is None:
                raise UnknownModel(f"{self.management} has no model {self._path}")
            queue = answer["jobQueueStatus"]
            return State(
                version=answer["modelVersion"],
                wanted=answer["minWorkers"],
                workers=[_worker(worker) for worker in answer["workers"]],
                pending=queue["pendingRequests"],
                remaining=queue["remainingCapacity"],
            )
        except (KeyError, IndexError, TypeError) as exc:  # of JSON that is not TorchServe's
            raise requests.exceptions.InvalidJSONError("not TorchServe's") from exc

    @property
    def _path(self) -> str:
        words = [self.name, self.version] if self.version else [self.name]
        return "/".join(quote(word, safe="") for word in words)

    def resize(self, workers: int) -> None:
        """Ask for so many workers; they are there later.

        Both numbers, because workers are added up to the one and stopped down to the other. Not
        `synchronous`: TorchServe would wait on a thread that clients need.
        """
        with requests.Session() as session:
            session.trust_env = False
            url = f"{self.management}/models/{self._path}"
            query = {"min_worker": workers, "max_worker": workers}
            session.put(url, params=query, timeout=TIMEOUT_SECONDS).raise_for_status()

    def find_labels(self, version: str) -> set[str]:
        """What the counters of `version`, which describe() gave, are labelled with.

        The version where a request named it, and else "default".
        """
        if self.version is not None:
            default = Model(self.management, self.metrics, self.name).describe()
            if version != default.version:
                return {version}
        return {version, "default"}

    def read_counters(self, labels: set[str]) -> Counters:
        """The sums over some labels, from the metrics page."""
        page = healthcheck.get(f"{self.metrics}/metrics", TIMEOUT_SECONDS)
        page.raise_for_status()
        return parse_counters(page.text, self.name, labels)

    def wait_until_quiet(self, seconds: float, stop: Event) -> bool:
        """Whether within `seconds`, and before `stop`, no request was in hand for a moment.

        TorchServe does not say what its workers have in hand. What it counts is what comes in: when
        nothing has come for several times as long as a request takes, and none waits, all have been
        answered.
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
    """A model's counters on TorchServe's metrics page, summed over the labels of some versions."""
    sums = dict.fromkeys(("requests_total", "queue_latency", "inference_latency"), 0.0)
    names = {
        "ts_inference_requests_total": "requests_total",
        "ts_queue_latency_microseconds": "queue_latency",
        "ts_inference_latency_microseconds": "inference_latency",
    }
    for name, text, value in SAMPLE.findall(page):
        labels = dict(LABEL.findall(text))
        if name in names and labels["model_name"] == model and labels["model_version"] in versions:
            sums[names[name]] += float(value)
    return Counters(*sums.values())


def _worker(facts: dict[str, Any]) -> Worker:
    device = "cpu"
    if facts["gpu"]:
        found = re.search(r"gpuId::(\d+)", facts.get("gpuUsage", ""))
        device = f"cuda:{found[1]}" if found else "cuda"
    return Worker(
        id=facts["id"],
        pid=facts["pid"],
        device=device,
        status=facts["status"],
        memory=process_memory(facts["pid"]),
    )


def process_memory(pid: int, proc: Path = PROC) -> int | None:
    """Bytes that a worker's process takes; None where there is no such worker on this machine.

    Its own pages and its share of those that it has in common with others (PSS); of another user's
    process, which shows less, its resident pages.
    """
    folder = proc / str(pid)
    try:
        if b"model_service_worker" not in (folder / "cmdline").read_bytes():
            return None
        status = (folder / "status").read_text()
        try:
            found = re.search(r"^Pss:\s+(\d+) kB", (folder / "smaps_rollup").read_text(), re.M)
        except OSError:
            found = None
        found = found or re.search(r"^VmRSS:\s+(\d+) kB", status, re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def find_spaces(
    workers: Sequence[Worker],
    nvml: Any = None,
    available: Callable[[], int | None] = available_memory,
) -> list[Space]:
    """What the memory is that more workers would take; without what cannot be told from here.

    `nvml` is the module pynvml, initialised, and None where there is no GPU.
    """
    spaces = []
    taken = [worker.memory for worker in workers if worker.memory]
    free = available()
    if taken and free is not None:
        spaces.append(Space("memory", max(taken), free))
    if nvml is not None:
        spaces += _gpu_spaces([worker.pid for worker in workers], nvml)
    return spaces


def _gpu_spaces(pids: Sequence[int], nvml: Any) -> list[Space]:
    """One for each GPU on which some of the processes compute."""
    spaces = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        if _is_split(handle, nvml):
            continue
        try:
            processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError:  # a container may not be told
            continue
        ours = [process.usedGpuMemory for process in processes if process.pid in pids]
        if ours:
            known = [used for used in ours if used]
            # Not every driver says what a process takes: then no more than what all take.
            each = max(known) if known else memory.used // len(ours)
            spaces.append(Space(f"memory of GPU {index}", each, memory.free))
    return spaces


def _is_split(handle: Any, nvml: Any) -> bool:
    """Whether a card is split into MIG devices, whose memory is not the card's."""
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:  # no card of that kind
        return False


def count_fitting(spaces: Sequence[Space], more: int) -> int:
    """How many of so many more workers fit; the GPUs take turns."""
    gpus = sum(space.name != "memory" for space in spaces)
    for space in spaces:
        room = space.free // max(1, space.each)
        more = min(more, room if space.name == "memory" else room * gpus)
    return more
