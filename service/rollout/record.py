"""The file of GATEWAY_ROLLOUT: how far a rollout is, what it saw, and what the gateway shall do."""

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from handler.errors import SetupError
from service.gateway.rollout import KEY, Share
from service.processes import wait_until
from service.rollout.judgement import Counts

RUNNING, FINISHING = "running", "finishing"  # the latter: the new version is the default
UNFINISHED = (RUNNING, FINISHING)
ABORT_SECONDS = 180  # for another process to put everything back


@dataclass(kw_only=True)
class Record:
    """One rollout."""

    model: str
    old: str  # versions
    new: str
    archive: str  # a path
    sha256: str  # of the card in the archive, which has those of its other files
    keep_old: bool
    steps: list[str] = field(default_factory=list)
    started: float = 0.0  # Unix time
    changed: float = 0.0
    status: str = RUNNING
    reason: str = ""  # why it was taken back
    step: int = 0  # the last that was begun; 0: none
    is_replayed: bool = False
    slow: list[float] = field(default_factory=list)  # seconds: the old version's QUANTILES
    seen: list[dict[str, Any]] = field(default_factory=list)  # by step, what was counted and found

    @property
    def is_unfinished(self) -> bool:
        return self.status in UNFINISHED

    def alone(self) -> Counts | None:
        """What the old version did while it had all requests of clients."""
        found = [seen for seen in self.seen if seen and seen["percent"] == 0]
        return counts_of(found[-1], "old") if found else None


def counts_of(seen: dict[str, Any], arm: str) -> Counts:
    """What one version did in a step; JSON has made texts of the edges."""
    facts = seen[arm]
    seconds = {float(edge): number for edge, number in facts["seconds"].items()}
    return Counts(**facts | {"seconds": seconds})


class RecordFile:
    """The file, read by anybody and written by one process at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Record | None:
        """The last rollout; None if there was none. Raises SetupError."""
        try:
            content = json.loads(self._path.read_bytes())
            return Record(**{spec.name: content[spec.name] for spec in fields(Record)})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError) as exc:
            raise SetupError(f"{self._path} is no record of a rollout: {exc}") from exc

    def text(self) -> str:
        return self._path.read_text("utf-8").rstrip()

    def write(self, record: Record, share: Share | None = None) -> None:
        """Replace it; `share` is for the gateway. Raises SetupError."""
        record.changed = time.time()
        content = asdict(record) | {KEY: asdict(share) if share else None}
        new = self._path.with_name(f"{self._path.name}.new")
        try:
            new.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
            new.replace(self._path)
        except OSError as exc:
            raise SetupError(f"{self._path} cannot be written: {exc.strerror}") from exc

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Whether this process may write it: False while another one works on a rollout."""
        try:
            lock = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as exc:
            raise SetupError(f"{self._path}.lock cannot be made: {exc.strerror}") from exc
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
            yield True
        finally:
            os.close(lock)

    def interrupt(self) -> None:
        """Have the process that works on a rollout put everything back. Raises SetupError."""
        # Of the lock and not of the record: that may still be of an earlier rollout.
        holder = Path(f"{self._path}.lock").read_text()
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(int(holder), signal.SIGINT)
        if not wait_until(self._is_free, ABORT_SECONDS, 0.2):
            raise SetupError(f"the rollout does not end within {ABORT_SECONDS} s")

    def _is_free(self) -> bool:
        with self.held() as free:
            return free
