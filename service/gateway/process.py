"""nginx in front of TorchServe as a process: started, kept up to date, and stopped."""

import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from handler.errors import SetupError
from service.gateway.config import (
    DEPLOY,
    JOBS_CLIENT,
    Replicas,
    check_reachable,
    render,
    state,
    targets,
    worker_user,
)
from service.gateway.rollout import RolloutWatch
from service.gateway.settings import Client, GatewaySettings, read_keys
from service.gateway.watch import Watch
from service.jobs.process import Config as JobsConfig
from service.jobs.process import JobsServer
from service.logs import Log
from service.openinference.process import GrpcServer
from service.ports import check_ports
from service.processes import Guardian, end, wait_until
from service.temporary import TemporaryFolder

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = "nginx libnginx-mod-http-lua lua-cjson"  # Debian's and Ubuntu's names
MODULES = ("ndk_http_module.so", "ngx_http_lua_module.so")  # the second needs the first
PLACES = ("/usr/local/sbin", "/usr/sbin")  # nginx's folders, which PATH often lacks
POLL_SECONDS = 0.2
START_SECONDS = 10
MAX_STOP_SECONDS = 30
RESOLVE_SECONDS = 5  # between look-ups of the replicas' names


class GatewayEnded(Exception):
    """nginx, or the gRPC server beside it, has ended by itself; its log has the cause."""


class Gateway:
    """One nginx with its own temporary folder."""

    def __init__(self, settings: GatewaySettings, output: Log) -> None:
        """`output` takes the access log.

        Raises SetupError if nginx, its module or what gRPC or jobs need is not installed, or a
        key is malformed.
        """
        self._settings = settings
        self._output = output
        self._nginx, self._modules = find_nginx()
        self._grpc = GrpcServer(settings, output) if settings.grpc_port else None
        self._jobs = JobsServer(output) if settings.jobs_url else None
        self._jobs_key = secrets.token_urlsafe(32)
        self._clients = read_keys(settings.keys_file) if settings.keys_file else []
        self._replicas = Replicas.find(settings)
        self._looked = time.monotonic()
        self._watch = Watch(self._state, targets(settings), output)
        file = settings.rollout_file
        self._rollout = RolloutWatch(file, output) if file else None
        self._seen = self._changed = self._stamp()
        self._process: subprocess.Popen[bytes] | None = None
        self._log: threading.Thread | None = None
        self._guardian: Guardian | None = None
        self._temporary: TemporaryFolder | None = None
        self._folder = Path()

    def start(self) -> None:
        """Check the configuration and start nginx. Raises SetupError."""
        check_ports({"the gateway (GATEWAY_PORT)": self.address} | self.grpc_address)
        self._temporary = TemporaryFolder("gateway-")
        self._folder = self._temporary.path
        self._guardian = Guardian(self._folder)
        check_reachable(self._folder)
        self._folder.chmod(0o711)  # nginx's workers have another user if its master is root
        copy_pages(self._folder / "pages")  # that user may not be able to read the checkout
        user = worker_user()
        for name, owner in (("control", None), ("inside", user), ("jobs", user)):
            path = self._folder / name  # of sockets: nginx lets everybody write to its own
            path.mkdir(0o700)
            if owner:
                os.chown(path, owner.pw_uid, owner.pw_gid)
        reader, writer = os.pipe()
        command = [self._nginx, "-p", str(self._folder), "-c", str(self._folder / "nginx.conf")]
        try:
            self._write(f"/dev/fd/{writer}")
            checked = subprocess.run(
                [*command, "-t", "-q"],
                capture_output=True,
                text=True,
                check=False,
                pass_fds=[writer],
            )
            if checked.returncode != 0:
                _, _, reason = checked.stderr.splitlines()[0].partition(": ")  # time, process
                raise SetupError(f"nginx refuses its configuration: {reason}")
            pid_file = self._folder / "nginx.pid"
            pid_file.unlink(missing_ok=True)  # the check leaves one
            if self._grpc:  # first: it is asked as soon as nginx listens
                ids = (user.pw_uid, user.pw_gid) if user else None
                self._grpc.start(self._guardian, self._folder / "inside", ids, self._stop_seconds)
            self._process = self._guardian.start(command, pass_fds=[writer, self._temporary.lock])
        finally:
            os.close(writer)
            self._log = threading.Thread(target=self._relay, args=(reader,))
            self._log.start()
        process = self._process
        # nginx writes the file when it listens.
        wait_until(lambda: pid_file.exists() or process.poll() is not None, START_SECONDS, 0.02)
        if not pid_file.exists():
            raise SetupError("nginx did not start; the cause is in the log above")
        if self._jobs:
            self._jobs.start(self._guardian, self._jobs_config(self._folder / "inside" / "sock"))
        self._watch.start(self._folder / "control" / "sock")
        if self._rollout:
            self._rollout.start(self._folder / "control" / "sock")

    def _jobs_config(self, socket: Path) -> JobsConfig:
        settings = self._settings
        return JobsConfig(
            socket=str(self._folder / "jobs" / "sock"),
            gateway=str(socket),
            key=self._jobs_key,
            secret=settings.webhook_key().hex() if settings.jobs_webhooks else "",
            folder=str(Path(settings.jobs_folder).resolve()),
            max_image_bytes=settings.max_body_bytes,
            response_seconds=settings.response_timeout_seconds,
            stop_seconds=self._stop_seconds,
            settings=settings,
        )

    def _relay(self, reader: int) -> None:
        """Pass the access log on until nginx has ended.

        Through a pipe, because nginx would open stdout anew, and write over what others write to
        the same file.
        """
        with open(reader, "rb") as output:
            self._output.relay(output)

    def _state(self) -> dict[str, object]:
        """What nginx is told of: replicas, and whose keys are known, the jobs' among them."""
        clients = list(self._clients)
        if self._jobs:
            digest = hashlib.sha256(self._jobs_key.encode()).hexdigest()
            clients.append(Client(JOBS_CLIENT, digest))
        return state(self._replicas, clients)

    def _write(self, access_log: str) -> None:
        """What nginx reads when it starts."""
        config = render(self._settings, self._folder, access_log, self._modules)
        (self._folder / "nginx.conf").write_text(config, "utf-8")
        (self._folder / "state.json").write_text(json.dumps(self._state()), "utf-8")

    def _stamp(self) -> object:
        """A value that changes if the keys file does."""
        if self._settings.keys_file:
            with suppress(OSError):
                stat = self._settings.keys_file.stat()
                return stat.st_mtime_ns, stat.st_size, stat.st_ino
        return None

    def check(self) -> None:
        """Load the keys file and the replicas if they have changed; to be called repeatedly.

        What is invalid or cannot be found stays as it was. Raises GatewayEnded.
        """
        if self._process is None:
            return
        if (status := self._process.poll()) is not None:
            raise GatewayEnded(f"nginx ended with status {status}")
        if self._grpc and (status := self._grpc.exit_status()) is not None:
            raise GatewayEnded(f"the gRPC server ended with status {status}")
        if self._jobs:
            self._jobs.check()
        if time.monotonic() - self._looked >= RESOLVE_SECONDS:
            with suppress(SetupError):
                self._replicas = Replicas.find(self._settings)
            self._looked = time.monotonic()
        stamp = self._stamp()
        if stamp != self._changed:  # and may still be changing: editors empty a file first
            self._changed = stamp
            return
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            if self._settings.keys_file:
                self._clients = read_keys(self._settings.keys_file)
        except SetupError as exc:
            print(f"error: {exc}; the keys stay as they were", file=sys.stderr, flush=True)

    @property
    def url(self) -> str:
        """For a client on this machine."""
        return self._settings.url

    @property
    def address(self) -> tuple[str, int]:
        return self._settings.host, self._settings.port

    @property
    def grpc_url(self) -> str | None:
        """HOST:PORT of gRPC for a client on this machine, None if it is not served."""
        settings = self._settings
        return f"{settings.local_host}:{settings.grpc_port}" if settings.grpc_port else None

    @property
    def grpc_address(self) -> dict[str, tuple[str, int]]:
        """Where gRPC is served, by what it is for; empty if it is not."""
        settings = self._settings
        address = (settings.host, settings.grpc_port)
        return {"gRPC (GATEWAY_GRPC_PORT)": address} if settings.grpc_port else {}

    @property
    def _stop_seconds(self) -> int:
        """For requests in progress when it stops."""
        return min(self._settings.response_timeout_seconds, MAX_STOP_SECONDS)

    @property
    def has_keys(self) -> bool:
        return self._settings.keys_file is not None

    def stop(self) -> None:
        """Close the listeners, let requests in flight be answered, and end."""
        self._watch.stop()
        if self._rollout:
            self._rollout.stop()
        if self._jobs:
            with suppress(KeyboardInterrupt):  # as below
                self._jobs.stop(self._stop_seconds + 5)  # first, as below
        if self._grpc:
            with suppress(KeyboardInterrupt):  # a second Ctrl-C: it is killed at once
                self._grpc.stop(self._stop_seconds + 5)  # first: it asks nginx
        if self._process is not None:
            with suppress(KeyboardInterrupt):  # as above
                end(self._process, self._stop_seconds + 5, signal.SIGQUIT)
        if self._log is not None:
            self._log.join()
        if self._temporary is not None:
            self._temporary.remove()
        if self._guardian is not None:
            self._guardian.dismiss()


def copy_pages(folder: Path) -> None:
    """Copy deploy/gateway so that every user can read it, however the checkout was made."""
    shutil.copytree(DEPLOY, folder, copy_function=shutil.copyfile)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def find_nginx() -> tuple[str, list[Path]]:
    """nginx's path and those of its Lua modules. Raises SetupError, which says how to get them."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *PLACES])
    nginx = shutil.which("nginx", path=path)
    if nginx is None:
        raise SetupError(f"the gateway needs nginx: apt-get install {PACKAGES}")
    built = subprocess.run([nginx, "-V"], capture_output=True, text=True, check=False).stderr
    found = re.search(r"--modules-path=(\S+)", built)
    folder = Path(found[1] if found else "/usr/lib/nginx/modules")
    modules = [folder / name for name in MODULES]
    for module in modules:
        if not module.is_file():
            raise SetupError(f"the gateway needs nginx's {module.name}: apt-get install {PACKAGES}")
    return nginx, modules
