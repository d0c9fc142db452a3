"""One container of the image, without rights and without a network."""

import ctypes
import http.client
import json
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from container_test.commands import ROOT, Failed, check, run, wait_until

EXAMPLE = ROOT / "examples" / "clock.jpg"
NAME = f"classifier-test-{os.getpid()}"
PORT = 8000
READY_SECONDS = 180
STOP_SECONDS = 60
RUN_AS = "1000:1000"
CLONE_NEWNET = 0x40000000
LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass
class Container:
    """The image running without rights, with a network of its own that has loopback alone."""

    key: str
    pid: int
    ready_seconds: float = 0.0

    @classmethod
    def start(
        cls, image: str, keys: Path, key: str, *options: str, read_only: bool = True
    ) -> "Container":
        """Return when /health says ready."""
        started = time.monotonic()
        run(
            *("podman", "run", "--detach", "--name", NAME, "--user", RUN_AS, "--network=none"),
            *("--cap-drop=ALL", "--security-opt=no-new-privileges", "--tmpfs=/tmp:rw,mode=1777"),
            *(("--read-only", "--read-only-tmpfs=false") if read_only else ()),
            *("--volume", f"{keys}:/run/keys:ro", "--env=GATEWAY_KEYS=/run/keys", *options, image),
        )
        container = cls(key, int(inspect("State.Pid")))

        def is_ready() -> bool:
            if inspect("State.Running") != "true":
                raise Failed("the container has ended")
            return container.is_healthy()

        try:
            wait_until(is_ready, READY_SECONDS, "the container does not become ready")
        except Failed:
            print(run("podman", "logs", NAME, check=False), file=sys.stderr)
            raise
        container.ready_seconds = time.monotonic() - started
        return container

    def enter(self) -> None:
        """Put this thread into the container's network, for good."""
        with Path(f"/proc/{self.pid}/ns/net").open() as namespace:
            if LIBC.setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

    def ask(
        self, method: str, path: str, body: bytes | None = None, key: str = ""
    ) -> tuple[int, bytes]:
        """Status and body of an answer; 0 and no bytes if there is none."""
        found = [(0, b"")]

        def inside() -> None:
            with suppress(OSError, http.client.HTTPException):
                self.enter()
                client = http.client.HTTPConnection("127.0.0.1", PORT, timeout=30)
                client.request(method, path, body, {"X-API-Key": key} if key else {})
                response = client.getresponse()
                found.append((response.status, response.read()))
                client.close()

        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        return found[-1]

    def is_healthy(self) -> bool:
        return self.ask("GET", "/health")[0] == 200

    def shell(self, script: str) -> str:
        """stdout of commands in the container, whatever their status."""
        return run("podman", "exec", NAME, "sh", "-c", script, check=False)

    def predict(self) -> Any:
        """The answer to the example, whose five classes are in order."""
        status, body = self.ask("POST", "/predict", EXAMPLE.read_bytes(), self.key)
        answer = json.loads(body)
        confidences = [entry["confidence"] for entry in answer["predictions"]]
        in_order = len(confidences) == 5 and confidences == sorted(confidences)[::-1]
        check("a prediction", status == 200 and in_order, body)
        return answer

    def stop(self, remove: bool = True) -> float:
        """SIGTERM; seconds until it has ended, which must be with status 0."""
        started = time.monotonic()
        run("podman", "stop", f"--time={STOP_SECONDS}", NAME)
        took = time.monotonic() - started
        status = inspect("State.ExitCode")
        if status != "0":
            print(run("podman", "logs", NAME, check=False), file=sys.stderr)
            raise Failed(f"the container ended with status {status} after {took:.1f} s")
        if remove:
            run("podman", "rm", NAME)
        return took

    def processes(self) -> dict[int, dict[str, str]]:
        """What /proc/PID/status says of each process in the container."""
        namespace = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (path / "ns/pid").readlink() == namespace:
                    lines = (path / "status").read_text().splitlines()
                    found[int(path.name)] = dict(
                        line.split(":\t", 1) for line in lines if ":\t" in line
                    )
        return found


def inspect(field: str) -> str:
    return run("podman", "inspect", f"--format={{{{.{field}}}}}", NAME)


def is_worker(pid: int) -> bool:
    """Whether it is one of TorchServe's workers; false if the process is gone."""
    try:
        return b"model_service_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
