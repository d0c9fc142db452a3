"""A gateway and replicas on free ports of loopback, started again when they end."""

import ctypes
import os
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests

from service.chaos.archive import SWITCH
from service.chaos.history import Ended, History, Left, Usage
from service.load.processes import Server, free_base_port, running
from service.processes import wait_until
from service.torchserve.config import ROOT
from service.torchserve.management import Management, UnknownModel, direct_session

DISK_BYTES = 256 * 2**20  # of each TMPDIR, if a file system can be mounted for it
RESPONSE_SECONDS = 20  # the longest that the gateway may let a client wait
CLEAR_SECONDS = 15  # for what is left of a launcher that was killed
CLONE_NEWNS = 0x00020000  # linux/sched.h
DROPPED = ("CLASSIFIER_", "GATEWAY_", "TS_", "PYTHONPATH")  # settings of the user's


def has_own_mounts() -> bool:
    """Give this process, and what it starts, mounts that end with it; False if it may not."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare") or libc.unshare(CLONE_NEWNS):
        return False
    return run_tool("mount", "--make-rprivate", "/")


def run_tool(*command: object) -> bool:
    """Whether a command of the system succeeds."""
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


def clean_environ() -> dict[str, str]:
    """This process' environment without settings of the user's."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(DROPPED) and not name.lower().endswith("_proxy")
    } | {"PYTHONPATH": str(ROOT)}


def is_taken(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclass
class Unit:
    """A launcher with what it has started; `number` is the replica's, or -1 for the gateway."""

    number: int
    command: list[str]
    environ: dict[str, str]
    ports: list[int]
    folder: Path  # its TMPDIR is in it
    started: int = 0
    server: Server | None = None
    seen: set[psutil.Process] = field(default_factory=set)
    _stack: ExitStack = field(default_factory=ExitStack)

    @property
    def name(self) -> str:
        return "gateway" if self.number < 0 else f"replica {self.number}"

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    @property
    def process(self) -> psutil.Process:
        """The launcher. Raises psutil.NoSuchProcess."""
        if self.server is None:
            raise psutil.NoSuchProcess(0, self.name)
        return psutil.Process(self.server.process.pid)

    def start(self) -> None:
        self.started += 1
        own = self.folder / f"start-{self.started}"
        own.mkdir()
        self.server = self._stack.enter_context(running(self.command, self.environ, own))

    def stop(self) -> None:
        """SIGTERM, and SIGKILL to what is left; no harm if it has ended."""
        self._stack.close()

    def has_ended(self) -> bool:
        return self.server is None or self.server.has_ended()

    def family(self) -> list[psutil.Process]:
        """Its processes that run now, which are remembered."""
        found: list[psutil.Process] = []
        with suppress(psutil.Error):
            found = [self.process, *self.process.children(recursive=True)]
        self.seen.update(found)
        return found

    def left(self) -> list[str]:
        """What of it is there: processes that were seen, files, and ports that are listened on."""
        names = []
        for process in self.seen:
            with suppress(psutil.Error):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    names.append(f"process {process.pid} {process.name()}")
        names += [f"file {path.name}" for path in self.temporary.iterdir()]
        names += [f"port {port}" for port in self.ports if is_taken(port)]
        return [f"{self.name}: {name}" for name in names]


class Cluster:
    """The gateway and the replicas of a campaign, until the end of a context."""

    def __init__(
        self,
        folder: Path,
        archive: Path,
        keys: Path,
        history: History,
        replicas: int,
        workers: int = 2,
    ) -> None:
        self.folder, self.model, self.keys = folder, archive.stem, keys
        self.history = history
        self.workers = [workers] * replicas  # as many as each replica should have
        self.has_disks = os.geteuid() == 0 and has_own_mounts()
        environ = clean_environ()
        self.replicas = [self._replica(n, archive, environ) for n in range(replicas)]
        self.gateway = self._gateway(environ)
        self.units = [*self.replicas, self.gateway]

    def _replica(self, number: int, archive: Path, environ: dict[str, str]) -> Unit:
        base = free_base_port()
        command = [sys.executable, str(ROOT / "scripts" / "serve.py"), f"--archive={archive}"]
        command += [f"--workers={self.workers[number]}", "--host=127.0.0.1", "--log-format=json"]
        command += [f"--port={base}", f"--management-port={base + 1}", f"--metrics-port={base + 2}"]
        folder = self._make_folder(f"r{number}")
        environ = environ | {"TMPDIR": str(folder / "tmp"), SWITCH: str(folder / "hang")}
        return Unit(number, command, environ, [base, base + 1, base + 2], folder)

    def _gateway(self, environ: dict[str, str]) -> Unit:
        folder, port = self._make_folder("gateway"), free_base_port() + 3
        variables = {
            "PORT": str(port),
            "UPSTREAMS": ",".join(f"127.0.0.1:{unit.ports[0]}" for unit in self.replicas),
            "MANAGEMENT": ",".join(f"127.0.0.1:{unit.ports[1]}" for unit in self.replicas),
            "MODELS": self.model,
            "KEYS": str(self.keys),
            "RATE": "0",
            "RESPONSE_TIMEOUT_SECONDS": str(RESPONSE_SECONDS),
            "CLIENT_TIMEOUT_SECONDS": "8",  # longer than nginx is ever stopped
            "BODY_TIMEOUT_SECONDS": "10",
        }
        environ = environ | {f"GATEWAY_{name}": value for name, value in variables.items()}
        environ["TMPDIR"] = str(folder / "tmp")
        command = [sys.executable, str(ROOT / "scripts" / "gateway.py")]
        return Unit(-1, command, environ, [port], folder)

    def _make_folder(self, name: str) -> Path:
        folder = self.folder / name
        (folder / "tmp").mkdir(parents=True)
        for path in (self.folder, folder, folder / "tmp"):
            path.chmod(0o755)  # nginx's workers are nobody's if we are root
        if self.has_disks:
            options = f"size={DISK_BYTES},mode=755"
            self.has_disks = run_tool("mount", "-t", "tmpfs", "-o", options, "none", folder / "tmp")
        return folder

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        """End everything, and note what is left."""
        for unit in reversed(self.units):  # the gateway first
            unit.family()
            unit.stop()
        wait_until(lambda: not any(unit.left() for unit in self.units), CLEAR_SECONDS)
        for unit in self.units:
            for what in unit.left():
                self.history.add(Left(what=what))

    def unmount(self) -> None:
        """What was mounted for the units; to be called when everything has ended."""
        for unit in self.units if self.has_disks else []:
            run_tool("umount", unit.temporary)

    def management(self, replica: int) -> Management:
        return Management(f"http://127.0.0.1:{self.replicas[replica].ports[1]}", timeout=5)

    def worker_pids(self, replica: int) -> list[int]:
        """The ready workers of a replica. Raises requests.RequestException."""
        workers = self.management(replica).describe(self.model).workers
        return sorted(worker.pid for worker in workers if worker.is_ready)

    def tend(self) -> None:
        """Start again what has ended, as systemd would, and remember all processes."""
        for unit in self.units:
            if unit.server and unit.has_ended():
                status = unit.server.process.returncode
                self.history.add(Ended(time=self.history.now(), replica=unit.number, status=status))
                unit.stop()
                unit.start()
            unit.family()

    def restart(self, unit: Unit) -> None:
        """Stop a launcher as operators do, and start it again."""
        unit.family()
        unit.stop()
        unit.start()

    def is_whole(self) -> bool:
        """Whether every replica has its workers ready and the gateway uses them all."""
        return not any(unit.has_ended() for unit in self.units) and not self.missing()

    def missing(self) -> str:
        """What keeps it from being whole; "" if it is."""
        for replica, expected in enumerate(self.workers):
            try:
                pids = self.worker_pids(replica)
                able = [
                    pid for pid in pids if psutil.Process(pid).status() != psutil.STATUS_STOPPED
                ]
            except (requests.RequestException, UnknownModel, psutil.Error) as exc:
                return f"replica {replica}: {type(exc).__name__}"
            if not len(able) == len(pids) == expected:
                return f"replica {replica}: {len(able)} of {expected} workers are ready and run"
        try:
            with direct_session() as session:
                url = f"http://127.0.0.1:{self.gateway.ports[0]}/health"
                health = session.get(url, timeout=5).json()
            in_use = health["replicas"]["ready"]
        except (requests.RequestException, ValueError, LookupError) as exc:
            return f"the gateway: {type(exc).__name__}"
        if in_use != len(self.replicas):
            return f"the gateway uses {in_use} of {len(self.replicas)}: {health.get('left_out')}"
        return ""

    def sample(self) -> None:
        """Note what every process uses."""
        for unit in self.units:
            for process in unit.family():
                with suppress(psutil.Error):
                    with process.oneshot():
                        kind = _kind(process, unit)
                        rss, descriptors = process.memory_info().rss, process.num_fds()
                    self.history.add(
                        Usage(
                            time=self.history.now(),
                            process=f"{kind} of {unit.name}",
                            pid=process.pid,
                            rss=rss,
                            descriptors=descriptors,
                        )
                    )


def _kind(process: psutil.Process, unit: Unit) -> str:
    name = process.name()
    if unit.server and process.pid == unit.server.process.pid:
        return "launcher"
    if name.startswith("nginx"):
        return "nginx worker" if "worker" in " ".join(process.cmdline()) else "nginx master"
    return "worker" if name.startswith("python") else name
