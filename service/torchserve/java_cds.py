"""Write down Java's classes as it keeps them in memory, so that TorchServe starts in less time.

    scripts/java_cds.py    once after an installation; ./scripts/serve does it by itself

Starts TorchServe without a model to see which classes it takes, and lets Java dump those into a
file (class data sharing). Java reads the file only where it is of the same build and the same jar,
and otherwise starts as if there were none.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from handler.errors import SetupError
from service.torchserve.java import find_java, utf8_locale
from service.torchserve.server import (
    CLASS_ARCHIVE,
    FRONTEND,
    LOG_CONFIG,
    SERVER_HOME,
)

START_SECONDS = 60
DUMP_SECONDS = 120
STOP_SECONDS = 10


def main(argv: Sequence[str] | None = None) -> int:
    del argv  # there are no options
    try:
        make_class_archive(find_java(), CLASS_ARCHIVE)
    except SetupError as exc:
        print(f"warning: no class archive, Java starts slower: {exc}", file=sys.stderr)
        return 1
    print(f"{CLASS_ARCHIVE}  {CLASS_ARCHIVE.stat().st_size / 2**20:.1f} MiB")
    return 0


def make_class_archive(java: Path, archive: Path) -> None:
    """Replace the archive, as a whole or not at all. Raises SetupError."""
    try:
        with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".classes-") as name:
            folder = Path(name)
            _list_classes(java, folder)
            _run(
                [
                    java,
                    "-Xshare:dump",
                    f"-XX:SharedClassListFile={folder / 'classes'}",
                    f"-XX:SharedArchiveFile={folder / 'archive'}",
                    *("-cp", FRONTEND),
                ]
            )
            (folder / "archive").replace(archive)
    except (OSError, subprocess.SubprocessError) as exc:
        raise SetupError(f"{java}: {exc}") from exc


def _list_classes(java: Path, folder: Path) -> None:
    """Write the names of the classes that TorchServe loads until it answers."""
    with ExitStack() as stack:  # all at once, so that no two are the same
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(5)]
        ports = [probe.getsockname()[1] for probe in probes]
    (folder / "config.properties").write_text(
        f"inference_address=http://127.0.0.1:{ports[0]}\n"
        f"management_address=http://127.0.0.1:{ports[1]}\n"
        f"metrics_address=http://127.0.0.1:{ports[2]}\n"
        f"grpc_inference_port={ports[3]}\n"
        f"grpc_management_port={ports[4]}\n"
        "grpc_inference_address=127.0.0.1\n"
        "grpc_management_address=127.0.0.1\n"
        "disable_token_authorization=true\n"
        "disable_system_metrics=true\n"
        "metrics_mode=prometheus\n"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TS_")}
    process = subprocess.Popen(
        [
            str(java),
            f"-XX:DumpLoadedClassList={folder / 'classes'}",
            f"-Dmodel_server_home={SERVER_HOME}",
            f"-Dlog4j.configurationFile={LOG_CONFIG.as_uri()}",
            f"-Djava.io.tmpdir={folder}",
            *("-cp", FRONTEND, "org.pytorch.serve.ModelServer", "--python", sys.executable),
            *("-f", str(folder / "config.properties"), "-s", str(folder), "-ncs"),
        ],
        cwd=folder,
        env=environ
        | utf8_locale()
        | {"LOG_LOCATION": str(folder), "METRICS_LOCATION": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(ports[1]):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SetupError(f"{java} did not start TorchServe")
            time.sleep(0.1)
        process.terminate()
        process.wait(STOP_SECONDS)
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    """Ask for the models: that takes the classes of a request as well."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.sendall(b"GET /models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return client.recv(4096).startswith(b"HTTP/1.1 200")
    return False


def _run(command: list[object]) -> None:
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | utf8_locale(),
        capture_output=True,
        text=True,
        timeout=DUMP_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise SetupError(f"{command[0]} ended with status {done.returncode}")
