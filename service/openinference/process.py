"""The gRPC server as a process: what it is told, started, watched and ended."""

import json
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from handler.errors import SetupError
from service.gateway.settings import PREFIX, GatewaySettings
from service.logs import Log
from service.processes import Guardian, end, wait_until

ROOT = Path(__file__).resolve().parents[2]
# The working directory, which may hold modules of these names, is not looked in.
SERVE = (
    f"import sys; sys.path[0] = {str(ROOT)!r}; "
    "from service.openinference.server import serve_from; sys.exit(serve_from(sys.stdin.buffer))"
)
START_SECONDS = 30


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the server needs to know, as JSON on stdin."""

    listen: str  # path of a Unix socket, as the next
    gateway: str
    user: tuple[int, int] | None  # ids of the user and group to become
    max_body_bytes: int
    max_concurrent: int
    body_seconds: int
    response_seconds: int
    stop_seconds: int

    @classmethod
    def read(cls, text: bytes) -> "Config":
        facts = json.loads(text)
        user = facts.pop("user")
        return cls(user=(user[0], user[1]) if user else None, **facts)


class GrpcServer:
    """The process, once start() has returned."""

    def __init__(self, settings: GatewaySettings, output: Log) -> None:
        """`output` takes its log. Raises SetupError if a package is missing."""
        for package in ("grpc", "google.protobuf", "grpc_reflection", "grpc_health", "aiohttp"):
            if not _is_installed(package):
                raise SetupError(
                    f"{PREFIX}GRPC_PORT needs the packages of requirements-grpc.txt; "
                    f"{package} is missing"
                )
        self._settings = settings
        self._output = output
        self._process: subprocess.Popen[bytes] | None = None
        self._log: threading.Thread | None = None

    def start(
        self, guardian: Guardian, folder: Path, user: tuple[int, int] | None, stop_seconds: int
    ) -> None:
        """Start it between two sockets of nginx's. Raises SetupError.

        `folder` is where they are, `user` the ids of the user and group that it becomes.
        """
        settings, socket = self._settings, folder / "grpc"
        config = Config(
            listen=str(socket),
            gateway=str(folder / "sock"),
            user=user,
            max_body_bytes=settings.max_body_bytes,
            max_concurrent=settings.max_concurrent,
            body_seconds=settings.body_timeout_seconds,
            response_seconds=settings.response_timeout_seconds,
            stop_seconds=stop_seconds,
        )
        process = self._process = guardian.start(
            [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin is not None  # noqa: S101 - for mypy: both are pipes
        process.stdin.write(json.dumps(asdict(config)).encode())
        process.stdin.close()
        self._log = threading.Thread(target=self._relay, args=(process,))
        self._log.start()
        wait_until(lambda: socket.exists() or process.poll() is not None, START_SECONDS, 0.02)
        if not socket.exists():
            raise SetupError("the gRPC server did not start; the cause is in the log above")

    def _relay(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None  # noqa: S101 - as above
        with process.stdout as output:
            self._output.relay(output)

    def exit_status(self) -> int | None:
        """None while it runs."""
        return self._process.poll() if self._process else None

    def stop(self, seconds: float) -> None:
        """Let calls in progress be answered, and end it; it is killed if that takes longer."""
        if self._process is not None:
            end(self._process, seconds)
        if self._log is not None:
            self._log.join()


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # its parent
        return False
