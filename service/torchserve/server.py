"""TorchServe as a process: started, watched and stopped."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO, Any

import ts

from handler.errors import SetupError
from handler.machine import available_memory
from service.archive.mar import unpack
from service.guardian import Guardian
from service.torchserve.config import CONFIG, ROOT, ServerConfig
from service.torchserve.java import MEMORY_OPTIONS, OUT_OF_MEMORY, memory_bounds, utf8_locale
from service.torchserve.watchdog import Hung, Watchdog

SERVER_HOME = Path(ts.__file__).parent.parent
FRONTEND = str(SERVER_HOME / "ts" / "frontend" / "*")  # Java expands it
CLASS_ARCHIVE = Path(sys.prefix) / "java-classes.jsa"  # made by scripts/java_cds.py
LOG_CONFIG = ROOT / "handler" / "configs" / "log4j2.xml"
STOP_SECONDS = 15
READ_SECONDS = 5  # for what Java has printed before its end
MAX_FOLDER = 85  # a socket's path has 104 bytes on macOS, and ends in "/.ts.sock.9000"


@dataclass(frozen=True)
class Served:
    """An archive that is served."""

    archive: Path
    config: Mapping[str, Any] | None = None  # the model configuration; None: the one in the archive
    digest: str | None = None  # what the checked archive was made from: another is refused


def make_folder() -> str:
    """A temporary folder for sockets and unpacked archives. Raises SetupError."""
    try:
        folder = tempfile.mkdtemp(prefix="torchserve-")
    except OSError as exc:
        raise SetupError(f"no temporary folder can be made (TMPDIR): {exc}") from exc
    if len(os.fsencode(folder)) > MAX_FOLDER:
        Path(folder).rmdir()
        raise SetupError(
            f"TMPDIR leads to {folder}, too long for the sockets in it: {MAX_FOLDER} bytes fit"
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
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: Thread | None = None
        self._guardian: Guardian | None = None
        self._watchdog: Watchdog | None = None
        self._folder = ""
        self._out_of_memory: str | None = None  # in Java's words

    def start(self, relay: Callable[[IO[bytes]], None] | None = None) -> None:
        """Start Java as the launcher `torchserve` would.

        `relay` reads what it prints, in a thread of its own, until it ends; None: that goes where
        our output goes. The launcher itself forwards no signals, knows one server per machine by
        its PID file, and stays around as a process.
        """
        self._folder = make_folder()
        self._guardian = Guardian(self._folder)
        # What is served is a copy: no start changes an archive, or is changed by another start.
        store = Path(self._folder, "store")
        models = [
            # Two may have one name.
            unpack(one.archive, one.config, store / f"{number}-{one.archive.stem}", one.digest)
            for number, one in enumerate(self._served)
        ]
        plugins = [self._config.plugins_path] if self._config.plugins_path else []
        command = [
            self._java,
            f"-Dmodel_server_home={SERVER_HOME}",
            f"-Dlog4j.configurationFile={LOG_CONFIG.as_uri()}",
            f"-Djava.io.tmpdir={self._folder}",
            # One that is missing or of another Java is ignored, and newer ones call that an error.
            *(f"-XX:SharedArchiveFile={CLASS_ARCHIVE}", "-Xlog:cds=off"),
            "-XX:-UsePerfData",  # a file in /tmp, which kill -9 would leave there
            *MEMORY_OPTIONS,
            *memory_bounds(available_memory()),
            *self._config.vmargs,
            *("-cp", ":".join([FRONTEND, *plugins])),
            "org.pytorch.serve.ModelServer",
            *("--python", sys.executable),
            *("-f", CONFIG),
            *("-s", store),
            "-ncs",  # no snapshots: the last one would be restored instead of what is asked for
            *("-m", *(model.name for model in models)),  # served under the names in them
        ]
        environ = os.environ | {
            "TEMP": self._folder,
            "TMPDIR": self._folder,
            "LOG_LOCATION": self._folder,
            "METRICS_LOCATION": self._folder,
            "TS_MODEL_STORE": str(store),
            # The handler reads JSON itself; TorchServe's worker would log a traceback for each
            # malformed body. Workers see this variable, not the key of config.properties.
            "TS_DECODE_INPUT_REQUEST": "false",
        }
        environ |= utf8_locale()
        # Either would go over what is passed here, and into the workers.
        for name in ("TS_CONFIG_FILE", "PYTHONPATH"):
            environ.pop(name, None)
        try:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                env=environ | dict(self._environ),
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if relay else None,
                stderr=subprocess.STDOUT if relay else None,
                start_new_session=True,  # Ctrl-C reaches us alone; the group can be ended as one
            )
        except OSError as exc:
            raise SetupError(f"{self._java} cannot be run: {exc.strerror}") from exc
        self._guardian.watch(self._process.pid)
        self._watchdog = Watchdog(store, self._process.pid)
        if relay:
            self._reader = Thread(target=relay, args=[self._process.stdout], daemon=True)
            self._reader.start()

    def read(self, line: bytes) -> None:
        """A line that Java has printed: for `relay` to call."""
        if found := OUT_OF_MEMORY.match(line):
            self._out_of_memory = found[1].decode("utf-8", "replace").removesuffix(", aborting")

    def exit_status(self) -> int | None:
        """None while it runs."""
        return self._process.poll() if self._process else None

    def out_of_memory(self) -> str | None:
        """What Java, which has ended, said that it had no memory for."""
        if self._reader is not None:
            self._reader.join(READ_SECONDS)
        return self._out_of_memory

    def end_hung_workers(self) -> list[Hung]:
        """To be called again and again: TorchServe starts others in their place."""
        return self._watchdog.check() if self._watchdog else []

    def stop(self) -> None:
        """End Java, then whatever is left of its group, and remove the folder."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                print("TorchServe did not stop in time; killing it", file=sys.stderr)
            except KeyboardInterrupt:  # a second Ctrl-C
                pass
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # from here on it takes no time
            with suppress(ProcessLookupError):  # nothing is left
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._reader is not None:  # its last lines
            self._reader.join(READ_SECONDS)
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._guardian is not None:
            self._guardian.dismiss()
