"""Ends workers that hang: they have stopped giving the sign of life that handler/pulse.py gives."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from handler.pulse import HUNG_PREFIX, PREFIX

LOOK_SECONDS = 1.0
LATE_SECONDS = 2.0
SILENT_LOOKS = 10  # a worker beats once a second, so it has missed as many beats


@dataclass(frozen=True)
class Hung:
    """A worker that was killed."""

    pid: int
    model: str  # "" if it is unloaded by now


class Watchdog:
    """Compares what it sees with what it saw the last time, and never with a clock.

    So no clock that is set, and no time in which the machine slept, looks like silence. A look that
    comes late starts anew: we were stopped ourselves, or starve, and so may the workers have.
    """

    def __init__(self, store: Path, group: int) -> None:
        """The models' folders are in `store`; the workers are of the process group."""
        self._store = store
        self._group = group
        self._seen: dict[Path, tuple[int, int]] = {}  # the last beat, and the looks that saw it
        self._looked = time.monotonic()

    def check(self) -> list[Hung]:
        """To be called again and again: kill the workers that hang, and say which they were."""
        now = time.monotonic()
        passed = now - self._looked
        if passed < LOOK_SECONDS:
            return []
        self._looked = now
        before = self._seen if passed < LATE_SECONDS else {}
        self._seen = {}
        for file, beat in self._beats():
            last, looks = before.get(file, (0, 0))
            self._seen[file] = (beat, looks + 1 if beat == last else 0)
        silent = [file for file, (_, looks) in self._seen.items() if looks >= SILENT_LOOKS]
        return [hung for file in silent if (hung := self._end(file))]

    def _beats(self) -> Iterator[tuple[Path, int]]:
        for file in self._store.glob(f"*/{PREFIX}*"):
            try:
                yield file, file.stat().st_mtime_ns
            except FileNotFoundError:  # the model is being unloaded
                continue

    def _end(self, file: Path) -> Hung | None:
        """Kill a worker; None if it has ended by itself."""
        pid = int(file.name.removeprefix(PREFIX))
        try:
            if os.getpgid(pid) != self._group:  # its number is somebody else's by now
                raise ProcessLookupError
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            file.unlink(missing_ok=True)
            return None
        model = ""
        with suppress(FileNotFoundError):  # the model was unloaded meanwhile
            file.replace(file.with_name(f"{HUNG_PREFIX}{pid}"))  # for the next worker to count
            manifest = json.loads((file.parent / "MAR-INF" / "MANIFEST.json").read_text("utf-8"))
            model = manifest["model"]["modelName"]
        return Hung(pid, model)
