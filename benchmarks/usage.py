"""What a server uses, by its parts: CPU time and memory of its processes, from /proc (Linux)."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from service.load.measurement import Measurement
from service.load.processes import Server

LAUNCHER, JAVA, WORKER, GATEWAY, GRPC = "launcher", "Java", "worker", "nginx", "gRPC"
GRPC_MODULE = "service.openinference.server"
SCRIPTS = {"serve.py": LAUNCHER, "model_service_worker.py": WORKER}

# Java's threads by the start of their names, which the kernel cuts at 15 characters.
JAVA_THREADS = (
    ("C1 Compiler", "Java: compilers"),
    ("C2 Compiler", "Java: compilers"),
    ("epollEventLoop", "Java: Netty"),
    ("nioEventLoop", "Java: Netty"),
    ("W-", "Java: workers' threads"),  # they poll for a batch, hand it over and wait
)
JAVA_LOG = "Java: workers' output"  # the threads that read log lines and metrics; also named W-
JAVA_REST = "Java: rest"

MEMORY_KINDS = (
    ("anonymous", re.compile(r"^(\[.*\]|/dev/zero.*|)$")),
    ("torch", re.compile(r"/(torch|torchvision|torch\.libs|torchvision\.libs)/")),
    ("OpenVINO", re.compile(r"/openvino/")),
    ("weights", re.compile(r"\.(bin|safetensors|pt|pth|onnx)$")),
    ("other files", re.compile("")),
)
KINDS = tuple(kind for kind, _ in MEMORY_KINDS)


class Meter:
    """CPU time of a server's processes between the first and the last call of `read`."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._parts = {process: part_of(process) for process in server.family()}
        # The thread that serves a worker starts its process; those that read its output come later.
        workers = [process.pid for process, part in self._parts.items() if part == WORKER]
        self._first_worker = min(workers, default=0)
        self._threads: dict[tuple[int, int], tuple[str, float]] = {}  # those that ended as well
        self._readings: list[Counter[str]] = []

    def read(self) -> None:
        """Note the CPU time up to now. It takes milliseconds, because the server is measured."""
        seconds: Counter[str] = Counter()
        for process, part in self._parts.items():
            with suppress(psutil.Error, OSError):
                seconds.update(self._seconds(process, part))
        self._readings.append(seconds)

    def ms_per_request(self, run: Measurement) -> dict[str, float]:
        """Milliseconds of CPU time by part, divided by the requests that were answered well.

        A process that has ended counts with its parent, and one that began in between whole.
        """
        used = Counter(self._readings[-1])
        used.subtract(self._readings[0])
        for process in set(self._server.family()) - set(self._parts):
            with suppress(psutil.Error, OSError):
                used.update(self._seconds(process, part_of(process)))
        answered = run.throughput_rps * run.seconds
        return {part: 1000 * s / answered for part, s in used.items()} if answered else {}

    def _seconds(self, process: psutil.Process, part: str) -> dict[str, float]:
        times = process.cpu_times()
        total = times.user + times.system + times.children_user + times.children_system
        if part != JAVA:
            return {part: total}
        for name, thread, seconds in threads(process.pid):
            group = next((group for start, group in JAVA_THREADS if name.startswith(start)), "")
            if name.startswith("W-") and thread > self._first_worker:
                group = JAVA_LOG
            if group:
                self._threads[process.pid, thread] = group, seconds
        groups: Counter[str] = Counter()
        for (pid, _), (group, seconds) in self._threads.items():
            if pid == process.pid:
                groups[group] += seconds  # type: ignore[assignment]  # typed for int, adds floats
        return groups | {JAVA_REST: max(0.0, total - sum(groups.values()))}


def threads(pid: int) -> Iterator[tuple[str, int, float]]:
    """Name, number and seconds of CPU time of each thread that a process has."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has just ended
            nanoseconds = (task / "schedstat").read_text().split()[0]
            yield (task / "comm").read_text().strip(), int(task.name), int(nanoseconds) / 1e9


def memory(server: Server) -> list[dict[str, Any]]:
    """PSS of every process of a server in MiB, by kind too, largest first."""
    rows = []
    for process in server.family():
        with suppress(psutil.Error, OSError):
            smaps = Path(f"/proc/{process.pid}/smaps").read_text()
            kinds = {kind: size / 1024 for kind, size in kinds_of(smaps).items()}
            pss = process.memory_full_info().pss / 2**20
            rows.append({"process": part_of(process), "pss_mib": pss, "kinds_mib": kinds})
    return sorted(rows, key=lambda row: -row["pss_mib"])


def kinds_of(smaps: str) -> Counter[str]:
    """PSS in KiB by kind of mapping, from the text of /proc/PID/smaps."""
    kinds: Counter[str] = Counter()
    kind = ""
    for line in smaps.splitlines():
        if found := re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ *(.*)$", line):
            path = found[1].removesuffix(" (deleted)")
            kind = next(kind for kind, pattern in MEMORY_KINDS if pattern.search(path))
        elif line.startswith("Pss:"):
            kinds[kind] += int(line.split()[1])
    return kinds


def part_of(process: psutil.Process) -> str:
    """A process in a word or two: a part of the service, or its program and script."""
    try:
        words = process.cmdline() or [process.name()]
        program = Path(words[0].split()[0] if words[0] else process.name()).name
    except psutil.Error:
        return "ended"
    if program == "java":
        return JAVA
    if program.startswith("nginx"):
        return GATEWAY
    if any(GRPC_MODULE in word for word in words[1:]):
        return GRPC
    script = next((Path(word).name for word in words[1:] if word.endswith(".py")), None)
    if script is None and "-m" in words[:-1]:
        script = words[words.index("-m") + 1]
    return SCRIPTS.get(script or "", f"{program} {script}" if script else program)
