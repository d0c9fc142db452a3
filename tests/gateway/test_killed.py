"""kill -9 of a launcher: nothing of what it has started may be left."""

import socket
import sys
from pathlib import Path

import psutil

from tests import skip
from tests.gateway.conftest import serving_with_gateway
from tests.gateway.running import running
from tests.processes import alive, wait_for

SECONDS = 10


def wait_until_nothing_is_left(
    started: list[psutil.Process], folder: Path, ports: list[int]
) -> None:
    """No process of those, no file in what is their TMPDIR, and nobody who listens."""

    def left() -> list[object]:
        return [*alive(started), *folder.iterdir(), *filter(is_taken, ports)]

    try:
        wait_for(lambda: not left(), SECONDS, left)
    finally:
        for process in alive(started):
            process.kill()


def is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_serve(tmp_path: Path, temporary: Path, colours: list[str], store: Path) -> None:
    with serving_with_gateway(tmp_path, colours, store, TMPDIR=str(temporary)) as served:
        server = served.server
        started = psutil.Process(server.process.pid).children(recursive=True)
        names = [process.name() for process in started]
        assert {"java", "nginx"} < set(names)
        assert set(server.worker_pids()) < {process.pid for process in started}
        assert len(list(temporary.iterdir())) == 2
        server.process.kill()
        wait_until_nothing_is_left(started, temporary, [served.port, *server.ports.values()])


def test_guardians(tmp_path: Path, temporary: Path, colours: list[str], store: Path) -> None:
    """The kernel ends what is left, and the next start removes the folders."""
    if sys.platform != "linux":
        skip("only Linux ends a process with its parent")
    with serving_with_gateway(tmp_path, colours, store, TMPDIR=str(temporary)) as served:
        server = served.server
        started = psutil.Process(server.process.pid).children(recursive=True)
        folders = set(temporary.iterdir())
        found = [
            process
            for process in psutil.process_iter(["cmdline"])
            if process.info["cmdline"] and Path(process.info["cmdline"][-1]) in folders
            if process.info["cmdline"][0] == "/bin/sh"
        ]
        assert len(found) == len(folders) == 2
        for process in found:
            process.kill()
        server.process.kill()
        server.process.wait()

        def left() -> list[object]:
            return [*alive(started), *filter(is_taken, [served.port, *server.ports.values()])]

        try:
            wait_for(lambda: not left(), SECONDS, left)
        finally:
            for process in alive(started):
                process.kill()
        assert set(temporary.iterdir()) == folders
        server.start()
        assert len(set(temporary.iterdir())) == 2
        assert not folders & set(temporary.iterdir())


def test_gateway(tmp_path: Path, temporary: Path) -> None:
    with running(tmp_path, {"TMPDIR": str(temporary)}) as gateway:
        started = psutil.Process(gateway.process.pid).children(recursive=True)
        assert len(started) >= 2
        assert len(list(temporary.iterdir())) == 1
        gateway.process.kill()
        wait_until_nothing_is_left(started, temporary, [gateway.port])
