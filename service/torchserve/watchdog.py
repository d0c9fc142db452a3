"""Ends workers that hang, which no longer give the sign of life of handler/pulse.py."""

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
    """Compares each look with the one before, and never with a clock.

    So neither a clock that is set nor a machine that slept looks like silence. A look that comes
    late starts anew: this process was stopped or starved, and so the workers may have been too.
    """

    def __init__(self, store: Path, group: int) -> None:
        """`store` has the models' folders; `group` is the process group of the workers."""
        self._store = store
        self._group = group
        self._seen: dict[Path, tuple[int, int]] = {}  # the last beat, and the looks that saw it
        self._looked = time.monotonic()

    def check(self) -> list[Hung]:
        """Kill the workers that hang and return them; to be called again and again."""
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
            if os.getpgid(pid) != self._group:  # another process has its number by now
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
