"""The jobs' server as a process: what it is told, started, started again, and ended."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path

from handler.errors import SetupError
from service.jobs.settings import PREFIX, JobsSettings
from service.logs import Log
from service.processes import Guardian, end, wait_until

ROOT = Path(__file__).resolve().parents[2]
# The working directory, which may hold modules of these names, is not looked in.
SERVE = (
    f"import sys; sys.path[0] = {str(ROOT)!r}; "
    "from service.jobs.server import serve_from; sys.exit(serve_from(sys.stdin.buffer))"
)
PACKAGES = ("aiohttp", "dramatiq", "redis")
LISTENING = "jobs are taken"
START_SECONDS = 30
AGAIN_SECONDS = 1.0  # until one that has died is started again, twice as long each time
MAX_AGAIN_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the server needs to know. It comes on stdin, which nobody else can read."""

    socket: str  # path of its own Unix socket
    gateway: str  # and of the gateway's
    key: str  # of its predictions there
    secret: str  # that signs webhooks, in hex
    folder: str
    max_image_bytes: int
    response_seconds: int
    stop_seconds: int
    settings: JobsSettings

    @classmethod
    def read(cls, text: bytes) -> "Config":
        facts = json.loads(text)
        return cls(settings=JobsSettings(**facts.pop("settings")), **facts)

    def text(self) -> bytes:
        facts = asdict(self)
        names = {spec.name for spec in fields(JobsSettings)}
        facts["settings"] = {name: facts["settings"][name] for name in names}
        return json.dumps(facts).encode()


class JobsServer:
    """The process, once start() has returned; check() starts another if it has died."""

    def __init__(self, output: Log) -> None:
        """`output` takes its log. Raises SetupError if a package is missing."""
        for package in PACKAGES:
            if find_spec(package) is None:
                raise SetupError(
                    f"{PREFIX}URL needs the packages of requirements-jobs.txt; {package} is missing"
                )
        self._output = output
        self._listens = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._log: threading.Thread | None = None
        self._again_at = 0.0
        self._wait = AGAIN_SECONDS

    def start(self, guardian: Guardian, config: Config) -> None:
        """Start it and wait until it listens. Raises SetupError."""
        self._guardian, self._config = guardian, config
        folder = Path(config.folder)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise SetupError(f"{PREFIX}FOLDER: {folder} cannot be made: {exc}") from exc
        process = self._launch()
        wait_until(
            lambda: self._listens.is_set() or process.poll() is not None, START_SECONDS, 0.02
        )
        if not self._listens.is_set():
            raise SetupError("the jobs' server did not start; the cause is in the log above")

    def _launch(self) -> subprocess.Popen[bytes]:
        process = self._process = self._guardian.start(
            [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin is not None  # noqa: S101 - for mypy: both are pipes
        process.stdin.write(self._config.text())
        process.stdin.close()
        self._started = time.monotonic()
        self._log = threading.Thread(target=self._relay, args=(process,))
        self._log.start()
        return process

    def _relay(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None  # noqa: S101 - as above
        with process.stdout as output:
            self._output.relay(output, self._look)

    def _look(self, line: bytes) -> bool:
        if LISTENING.encode() in line:
            self._listens.set()
        return True

    def check(self) -> None:
        """Start it again if it has died; to be called repeatedly.

        Unlike the gateway's other parts: no job is lost, and predictions go on without it.
        """
        if self._process is None or (status := self._process.poll()) is None:
            return
        now = time.monotonic()
        if not self._again_at:
            if now - self._started > MAX_AGAIN_SECONDS:
                self._wait = AGAIN_SECONDS
            self._again_at = now + self._wait
            message = f"ended with status {status}; it is started again in {self._wait:g} s"
            self._output.event("ERROR", "jobs", message=message)
            self._wait = min(2 * self._wait, MAX_AGAIN_SECONDS)
        elif now >= self._again_at:
            self._again_at = 0.0
            try:
                self._launch()
            except OSError as exc:  # no memory, for one; predictions go on
                self._output.event("ERROR", "jobs", message=f"it does not start: {exc}")
                self._again_at = now + self._wait

    def stop(self, seconds: float) -> None:
        """Let images in progress be answered, and end it; it is killed if that takes longer."""
        if self._process is not None:
            end(self._process, seconds)
        if self._log is not None:
            self._log.join()
