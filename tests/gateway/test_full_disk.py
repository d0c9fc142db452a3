"""A TMPDIR in which nothing can be written any more: what has started goes on."""

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import requests

from tests import skip
from tests.gateway.clients import TIMEOUT
from tests.gateway.conftest import Served, serving_with_gateway
from tests.gateway.running import running, settings
from tests.processes import wait_for
from tests.server.colours import encoded

# A file system of its own for one process, on the folder $0.
MOUNT = 'mount -t tmpfs -o size=256m none "$0" && exec "$@"'


def check(url: str) -> None:
    """All that clients ask for, more often than a cache may answer alone."""
    for _ in range(3):
        health = requests.get(f"{url}/health", timeout=TIMEOUT)
        assert (health.status_code, health.json()["status"]) == (200, "healthy")
        info = requests.get(f"{url}/info", timeout=TIMEOUT)
        assert (info.status_code, info.json()["model"]) == (200, "mobilenet_v2")
        body = encoded("red") + bytes(8_000_000)  # too large for a buffer of the system's
        answer = requests.post(f"{url}/predict", data=body, timeout=TIMEOUT)
        assert answer.json()["predictions"][0]["class"] == "red"


def test_folders_that_cannot_be_written(gateway: Served, tmp_path: Path, temporary: Path) -> None:
    env = settings([gateway.server]) | {"TMPDIR": str(temporary)}
    with running(tmp_path, env) as other:
        [own] = temporary.iterdir()
        closed = [path for path in own.iterdir() if path.is_dir()]
        assert {"body", "proxy"} <= {path.name for path in closed}
        for path in closed:
            path.chmod(0o500)
        check(other.url)


def fill(folder: Path) -> None:
    with suppress(OSError), (folder / "large").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_disk(tmp_path: Path, temporary: Path, colours: list[str], store: Path) -> None:
    """Of ./scripts/serve and all that it starts; a worker that dies comes back, too."""
    under = ["unshare", "--mount", "sh", "-c", MOUNT, str(temporary)]
    if os.geteuid() or subprocess.run([*under, "true"], check=False).returncode:
        skip("no file system can be mounted here")
    started = serving_with_gateway(tmp_path, colours, store, under, TMPDIR=str(temporary))
    with started as served:
        url, server = served.url, served.server
        check(url)
        disk = Path(f"/proc/{server.process.pid}/root") / temporary.relative_to("/")
        fill(disk)
        assert psutil.disk_usage(str(disk)).free == 0
        check(url)
        killed = min(server.worker_pids())
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: killed not in server.worker_pids())
        wait_for(lambda: server.statuses() == ["READY"] * 2)
        check(url)
        assert not server.log("not_watched"), "the new worker gives its sign of life"
