"""The faults, each as a context that lasts as long as it does."""

import hashlib
import resource
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field

import psutil

from handler.errors import SetupError
from service.chaos.cluster import CLEAR_SECONDS, Cluster, Unit
from service.chaos.requests import Mixture, Request
from service.chaos.schedule import PAUSE_SECONDS, Step
from service.chaos.traffic import Traffic
from service.processes import wait_until
from service.torchserve.config import ROOT

MARGIN_BYTES = 8 * 2**20  # that a worker may still take under memory pressure
LARGE_IMAGES = 12  # at once
CROWD = 300  # requests at once, more than the gateway lets in for one client
SLOW_BODIES = 80  # at once
FORMS = 50  # broken ones at once
SCALE_SECONDS = 120
NEW_KEY_SECONDS = 15
OLD_KEYS_SECONDS = 1  # for which nginx's old processes may still answer: see docs/gateway.md


class NotPossible(Exception):
    """The fault cannot be injected on this machine; the message says why."""


@dataclass
class Scene:
    """What faults act on."""

    cluster: Cluster
    traffic: Traffic
    can_hang: bool  # the archive has the switch
    keys: list[str] = field(default_factory=list)
    cleared: float | None = None  # see Fault; of the last launcher that was killed

    def write_key(self) -> str:
        """A new key, which the keys file has from now on beside the one before."""
        self.keys = [*self.keys[-1:], secrets.token_urlsafe(16)]
        digests = [hashlib.sha256(key.encode()).hexdigest() for key in self.keys]
        lines = [f"client-{number} {digest}\n" for number, digest in enumerate(digests)]
        new = self.cluster.keys.with_suffix(".new")
        new.write_text("".join(lines))
        new.replace(self.cluster.keys)  # whole at once, as the gateway may read it at any time
        return self.keys[-1]


Fault = Callable[[Scene, Step], AbstractContextManager[None]]
FAULTS: dict[str, Fault] = {}


def fault(make: Callable[[Scene, Step], Iterator[None]]) -> Fault:
    """Register a generator that begins a fault, yields, and ends it."""
    made = FAULTS[make.__name__] = contextmanager(make)
    return made


@fault
def kill_worker(scene: Scene, step: Step) -> Iterator[None]:
    _worker(scene, step).kill()
    yield


@fault
def stop_worker(scene: Scene, step: Step) -> Iterator[None]:
    """A short pause ends by itself; after a longer one the launcher must replace the worker."""
    worker = _worker(scene, step)
    if step.seconds < PAUSE_SECONDS:
        return _stopped(worker)
    return _stopped_for_good(worker)


@fault
def kill_java(scene: Scene, step: Step) -> Iterator[None]:
    _java(scene, step).kill()
    yield


@fault
def stop_java(scene: Scene, step: Step) -> Iterator[None]:
    return _stopped(_java(scene, step))


@fault
def kill_launcher(scene: Scene, step: Step) -> Iterator[None]:
    return _killed(scene, scene.cluster.replicas[step.replica])


@fault
def kill_gateway(scene: Scene, _: Step) -> Iterator[None]:
    return _killed(scene, scene.cluster.gateway)


@fault
def stop_launcher(scene: Scene, step: Step) -> Iterator[None]:
    return _stopped(scene.cluster.replicas[step.replica].process)


@fault
def hung_model(scene: Scene, step: Step) -> Iterator[None]:
    if not scene.can_hang:
        raise NotPossible("the archive has no switch for it")
    switch = scene.cluster.replicas[step.replica].folder / "hang"
    switch.touch()
    try:
        yield
    finally:
        switch.unlink()


@fault
def full_disk(scene: Scene, step: Step) -> Iterator[None]:
    """TMPDIR of a replica and of the gateway."""
    if not scene.cluster.has_disks:
        raise NotPossible("no file system can be mounted for TMPDIR")
    units = scene.cluster.replicas[step.replica], scene.cluster.gateway
    fillers = [unit.temporary / "filler" for unit in units]
    try:
        for filler in fillers:
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        scene.traffic.burst(LARGE_IMAGES, Mixture.many_pixels)  # larger than nginx's buffers
        yield
    finally:
        for filler in fillers:
            filler.unlink(missing_ok=True)


@fault
def memory_pressure(scene: Scene, step: Step) -> Iterator[None]:
    """One worker may take no more memory than it has, but for a little."""
    if not hasattr(resource, "prlimit"):
        raise NotPossible("memory of another process cannot be limited")
    worker = _worker(scene, step)
    _, hard = resource.prlimit(worker.pid, resource.RLIMIT_AS)
    limit = worker.memory_info().vms + MARGIN_BYTES
    resource.prlimit(worker.pid, resource.RLIMIT_AS, (limit, hard))
    try:
        scene.traffic.burst(LARGE_IMAGES, Mixture.many_pixels)
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(worker.pid, resource.RLIMIT_AS, (hard, hard))


@fault
def scale(scene: Scene, step: Step) -> Iterator[None]:
    """A worker more, and later one less."""
    before = scene.cluster.workers[step.replica]
    _scale(scene, step.replica, before + 1)
    try:
        yield
    finally:
        _scale(scene, step.replica, before)


@fault
def rolling_restart(scene: Scene, step: Step) -> Iterator[None]:
    """One replica after the other, each when all are there."""
    for unit in scene.cluster.replicas:
        scene.cluster.restart(unit)
        if not wait_until(scene.cluster.is_whole, step.kind.recovery / 2, 0.5):
            break
    yield


@fault
def kill_nginx_worker(scene: Scene, _: Step) -> Iterator[None]:
    for worker in _nginx_workers(scene):
        worker.kill()
    yield


@fault
def stop_nginx_worker(scene: Scene, _: Step) -> Iterator[None]:
    return _stopped(*_nginx_workers(scene))


@fault
def new_keys(scene: Scene, _: Step) -> Iterator[None]:
    """Clients take the new key a second after it is right; the one before stays until the next."""
    key = scene.write_key()
    probe = Request(form="probe", target="/info", method="GET")
    wait_until(lambda: scene.traffic.ask(probe, key) == 200, NEW_KEY_SECONDS)
    time.sleep(OLD_KEYS_SECONDS)
    scene.traffic.key = key
    yield


@fault
def bad_multipart(scene: Scene, _: Step) -> Iterator[None]:
    scene.traffic.burst(FORMS, Mixture.broken_form)
    yield


@fault
def slow_bodies(scene: Scene, _: Step) -> Iterator[None]:
    """More than one client may have under way: they must lock nobody out."""
    scene.traffic.burst(SLOW_BODIES, Mixture.slower)
    yield


@fault
def crowd(scene: Scene, _: Step) -> Iterator[None]:
    """More than the gateway lets in: some are refused, with a reason."""
    scene.traffic.burst(CROWD, Mixture.crowded)
    yield


def _worker(scene: Scene, step: Step) -> psutil.Process:
    return psutil.Process(scene.cluster.worker_pids(step.replica)[0])


def _java(scene: Scene, step: Step) -> psutil.Process:
    family = scene.cluster.replicas[step.replica].family()
    return next(process for process in family if process.name() == "java")


def _nginx_workers(scene: Scene) -> list[psutil.Process]:
    family = scene.cluster.gateway.family()
    return [process for process in family if "worker process" in " ".join(process.cmdline())]


def _stopped(*processes: psutil.Process) -> Iterator[None]:
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)


def _stopped_for_good(process: psutil.Process) -> Iterator[None]:
    process.send_signal(signal.SIGSTOP)
    yield


def _killed(scene: Scene, unit: Unit) -> Iterator[None]:
    """kill -9 of a launcher; it starts again when nothing is left of it."""
    unit.family()
    began = time.monotonic()
    unit.process.kill()
    wait_until(lambda: not unit.left(), CLEAR_SECONDS)
    scene.cleared = round(time.monotonic() - began, 1)
    yield


def _scale(scene: Scene, replica: int, workers: int) -> None:
    """With ./scripts/scale. Raises SetupError if it fails."""
    cluster = scene.cluster
    _, management, metrics = (f"http://127.0.0.1:{p}" for p in cluster.replicas[replica].ports)
    command = [sys.executable, str(ROOT / "scripts" / "scale.py"), cluster.model, str(workers)]
    command += [f"--management={management}", f"--metrics={metrics}", "--force"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SCALE_SECONDS, check=False
    )
    if done.returncode:
        raise SetupError(f"./scripts/scale failed: {done.stderr.strip()}")
    cluster.workers[replica] = workers
