"""Java's class data sharing (CDS): its classes in a file as it keeps them in memory.

TorchServe starts in two thirds of the time with it. Java reads the file only if it is of the same
build and the same jar, and otherwise starts as if there were none.
"""

import os
import subprocess
from pathlib import Path

import requests

from handler.errors import SetupError
from service.ports import free_ports
from service.processes import Guardian, wait_until
from service.temporary import TemporaryFolder
from service.torchserve.java import FRONTEND, server_command, utf8_locale
from service.torchserve.management import Management

START_SECONDS = 60
DUMP_SECONDS = 120


def make_java_cds(java: Path, file: Path) -> None:
    """Replace the file, as a whole or not at all. Raises SetupError."""
    try:
        with TemporaryFolder(".classes-", file.parent) as folder:
            _list_classes(java, folder)
            _dump_classes(java, folder)
            (folder / "archive").replace(file)
    except (OSError, subprocess.SubprocessError) as exc:
        raise SetupError(f"{java}: {exc}") from exc


def _list_classes(java: Path, folder: Path) -> None:
    """Write the names of the classes that TorchServe loads until it answers."""
    inference, management, metrics, *grpc = free_ports(5)
    (folder / "config.properties").write_text(
        f"inference_address=http://127.0.0.1:{inference}\n"
        f"management_address=http://127.0.0.1:{management}\n"
        f"metrics_address=http://127.0.0.1:{metrics}\n"
        f"grpc_inference_port={grpc[0]}\n"
        f"grpc_management_port={grpc[1]}\n"
        "disable_token_authorization=true\n"
        "disable_system_metrics=true\n"
        "metrics_mode=prometheus\n"
    )
    (folder / "store").mkdir()
    options = [f"-XX:DumpLoadedClassList={folder / 'classes'}"]
    command = server_command(java, options, folder, folder / "config.properties")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TS_")}
    environ |= utf8_locale() | {"LOG_LOCATION": str(folder), "METRICS_LOCATION": str(folder)}
    client = Management(f"http://127.0.0.1:{management}")

    def answers() -> bool:
        try:
            client.models()  # which loads the classes of a request as well
        except requests.RequestException:
            return False
        return True

    with Guardian(folder) as guardian:
        process = guardian.start(
            command, cwd=folder, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        done = wait_until(lambda: process.poll() is not None or answers(), START_SECONDS)
        if not done or process.poll() is not None:
            raise SetupError(f"{java} did not start TorchServe")


def _dump_classes(java: Path, folder: Path) -> None:
    """Let Java write the classes of the list to the file `archive`."""
    command = [
        java,
        "-Xshare:dump",
        f"-XX:SharedClassListFile={folder / 'classes'}",
        f"-XX:SharedArchiveFile={folder / 'archive'}",
        *("-cp", FRONTEND),
    ]
    with Guardian(folder) as guardian:
        environ = os.environ | utf8_locale()
        status = guardian.start(
            command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ).wait(DUMP_SECONDS)
    if status != 0:
        raise SetupError(f"{java} ended with status {status}")
