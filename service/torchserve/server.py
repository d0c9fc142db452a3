"""TorchServe as a process: started, watched and stopped."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO, TYPE_CHECKING, Any

from handler.errors import SetupError
from handler.machine import available_cores, available_memory
from handler.model_card import ModelCard
from service.archive.mar import unpack
from service.processes import Guardian, end
from service.temporary import TemporaryFolder
from service.torchserve.config import CONFIG, ServerConfig
from service.torchserve.java import (
    JAVA_CDS,
    MEMORY_OPTIONS,
    NOISE,
    OUT_OF_MEMORY,
    memory_bounds,
    server_command,
    utf8_locale,
)
from service.torchserve.snapshot import make_snapshot
from service.torchserve.watchdog import Hung, Watchdog

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

STOP_SECONDS = 15
READ_SECONDS = 5  # for what Java has printed before its end
STARTUP_FAILED = b'"event": "startup_failed"'
MAX_FOLDER = 85  # a socket's path has 104 bytes on macOS, and ends in "/.ts.sock.9000"


@dataclass(frozen=True)
class Served:
    """An archive that is served."""

    archive: Path
    config: Mapping[str, Any] | None = None  # the model configuration; None: the one in the archive
    card: ModelCard | None = None  # of the archive that was looked at: another is refused
    public_key: "Ed25519PublicKey | None" = None  # of whoever must have signed it


def _pool_options() -> list[str]:
    """TorchServe's workers hand each batch to Java's common pool.

    On one or two cores that has one thread, which Java replaces by a new thread for each task.
    """
    few = available_cores() <= 2
    return ["-Djava.util.concurrent.ForkJoinPool.common.parallelism=2"] if few else []


def make_folder() -> TemporaryFolder:
    """For sockets and unpacked archives. Raises SetupError."""
    try:
        folder = TemporaryFolder("torchserve-")
    except OSError as exc:
        raise SetupError(f"no temporary folder can be made (TMPDIR): {exc}") from exc
    if len(os.fsencode(folder.path)) > MAX_FOLDER:
        folder.remove()
        raise SetupError(
            f"TMPDIR leads to {folder.path}, too long for the sockets in it: {MAX_FOLDER} bytes fit"
        )
    return folder


class TorchServe:
    """One TorchServe with its workers, in a process group and a folder of their own."""

    def __init__(
        self,
        java: Path,
        config: ServerConfig,
        served: Sequence[Served],
        environ: Mapping[str, str],
    ) -> None:
        """`environ` has the TS_ variables that go over config.properties."""
        self._java = java
        self._config = config
        self._served = served
        self._environ = dict(environ)
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: Thread | None = None
        self._guardian: Guardian | None = None
        self._watchdog: Watchdog | None = None
        self._folder: TemporaryFolder | None = None
        self._out_of_memory: str | None = None  # in Java's words
        self._startup_failures: dict[str, str] = {}  # by model: the last that a worker said

    def start(self, relay: Callable[[IO[bytes]], None] | None = None) -> None:
        """Start Java as the launcher `torchserve` would.

        `relay` reads its output in a thread of its own until it ends; without one, Java writes to
        our stdout and stderr. The launcher itself is not used: it forwards no signals, allows one
        server per machine (its PID file), and remains as a process.
        """
        self._folder = make_folder()
        folder = self._folder.path
        self._guardian = Guardian(folder)
        # What is served is a copy: no start changes an archive, or is changed by another start.
        store = folder / "store"
        models = [
            unpack(
                one.archive,
                one.config,
                store / f"{number}-{one.archive.stem}",  # two may have one name
                one.card,
                one.public_key,
            )
            for number, one in enumerate(self._served)
        ]
        options = [
            # A file that is missing or of another Java is ignored; newer ones call that an error.
            *(f"-XX:SharedArchiveFile={JAVA_CDS}", "-Xlog:cds=off"),
            "-XX:-UsePerfData",  # a file in /tmp, which kill -9 would leave there
            *MEMORY_OPTIONS,
            *memory_bounds(available_memory()),
            *_pool_options(),
            *self._config.vmargs,
        ]
        config = folder / CONFIG.name
        config.write_text(CONFIG.read_text("utf-8") + make_snapshot(models), "utf-8")
        command = server_command(self._java, options, folder, config, self._config.plugins_path)
        ours = dict.fromkeys(("TEMP", "TMPDIR", "LOG_LOCATION", "METRICS_LOCATION"), str(folder))
        ours |= {
            "TS_MODEL_STORE": str(store),
            # The handler reads JSON itself; TorchServe's worker would log a traceback for each
            # malformed body. Workers see this variable, not the key of config.properties.
            "TS_DECODE_INPUT_REQUEST": "false",
        }
        environ = os.environ | ours | utf8_locale() | self._environ
        # Either would go over what is passed here, and into the workers.
        for name in ("TS_CONFIG_FILE", "PYTHONPATH"):
            environ.pop(name, None)
        try:
            self._process = self._guardian.start(
                command,
                env=environ,
                cwd=folder,
                pass_fds=[self._folder.lock],
                stdout=subprocess.PIPE if relay else None,
                stderr=subprocess.STDOUT if relay else None,
            )
        except OSError as exc:
            raise SetupError(f"{self._java} cannot be run: {exc.strerror}") from exc
        self._watchdog = Watchdog(store, self._process.pid)
        if relay:
            self._reader = Thread(target=relay, args=[self._process.stdout], daemon=True)
            self._reader.start()

    def read(self, line: bytes) -> bool:
        """Look at a line that Java has printed; `relay` calls this.

        False if it tells nobody anything.
        """
        if found := OUT_OF_MEMORY.match(line):
            self._out_of_memory = found[1].decode("utf-8", "replace").removesuffix(", aborting")
        if STARTUP_FAILED in line:
            with suppress(ValueError, KeyError, TypeError):  # only looks like a worker's
                facts = json.loads(line)
                self._startup_failures[facts["model"]] = facts["message"]
        return not line.startswith(NOISE)

    def exit_status(self) -> int | None:
        """The status with which Java ended; None while it runs."""
        return self._process.poll() if self._process else None

    def out_of_memory(self) -> str | None:
        """Why Java ran out of memory, in its words, if that is why it ended."""
        if self._reader is not None:
            self._reader.join(READ_SECONDS)
        return self._out_of_memory

    def startup_failure(self, model: str) -> str | None:
        """Why a worker of a model, by its name or name/version, could not load it, in its words."""
        return self._startup_failures.get(model.partition("/")[0])

    def end_hung_workers(self) -> list[Hung]:
        """Kill the workers that hang and return them; to be called again and again.

        TorchServe starts others in their place.
        """
        return self._watchdog.check() if self._watchdog else []

    def stop(self) -> None:
        """End Java, then whatever is left of its group, and remove the folder."""
        if self._process is not None:
            with suppress(KeyboardInterrupt):  # a second Ctrl-C: it is killed at once
                if not end(self._process, STOP_SECONDS):
                    print("TorchServe did not stop in time and was killed", file=sys.stderr)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # from here on it takes no time
        if self._reader is not None:  # its last lines
            self._reader.join(READ_SECONDS)
        if self._folder is not None:
            self._folder.remove()
        if self._guardian is not None:
            self._guardian.dismiss()
