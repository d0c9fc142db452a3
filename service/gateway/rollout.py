"""Tells nginx what a rollout asks for: which share of the requests a new version gets.

./scripts/rollout writes a file again and again (service/rollout/record.py), and nginx is told of it
as often. A file that is not written any more counts for nothing, so that a new version that nobody
judges gets no requests.
"""

import json
import re
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from service.gateway.settings import NAME, VERSION
from service.gateway.watch import send
from service.logs import Log

LOOK_SECONDS = 0.5
STALE_SECONDS = 15.0
MAX_BYTES = 2**20  # of the file
KEY = "gateway"  # of the file's entry for us


@dataclass(frozen=True, kw_only=True)
class Share:
    """What nginx does for the present step of a rollout."""

    model: str
    old: str  # versions
    new: str
    percent: float  # of the requests for the model that name no version
    shadow: float  # percent of those that the old version answers
    step: int  # from 1; what is counted begins anew with each

    def __post_init__(self) -> None:
        """Raises ValueError: nothing else may get into a path or on the page of metrics."""
        names = (NAME, self.model), (VERSION, self.old), (VERSION, self.new)
        if not all(re.fullmatch(pattern, text) for pattern, text in names):
            raise ValueError("a name or a version that cannot be one")
        if type(self.step) is not int:
            raise TypeError("a step that is no whole number")
        if not (0 <= self.percent <= 100 and 0 <= self.shadow <= 100 and 1 <= self.step <= 1000):
            raise ValueError("a share or a step out of range")


def read_share(file: Path) -> Share | None:
    """What the file asks for now; None if nothing. Raises ValueError, TypeError or OSError."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    if time.time() - stat.st_mtime > STALE_SECONDS:
        return None
    if stat.st_size > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    content = json.loads(file.read_bytes())
    asked = content.get(KEY) if isinstance(content, dict) else None
    return Share(**asked) if asked else None


class RolloutWatch:
    """Looks at the file in a thread of its own, until it is stopped."""

    def __init__(self, file: Path, log: Log) -> None:
        self._file = file
        self._log = log
        self._ended = threading.Event()

    def start(self, control: Path) -> None:
        """Begin, and report to the nginx that listens on the socket `control`."""
        threading.Thread(target=self._run, args=(control,), name="rollout", daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    def _run(self, control: Path) -> None:
        shown: Share | None = None
        failure = ""
        while not self._ended.is_set():
            share, reason = None, ""
            try:
                share = read_share(self._file)
            except (OSError, ValueError, TypeError) as exc:
                reason = f"{self._file} cannot be used: {exc}"
            if reason and reason != failure:
                self._log.event("ERROR", "rollout", message=reason)
            failure = reason
            # Again and again: an nginx that has been restarted knows nothing.
            if send(control, "rollout", asdict(share) if share else None) and share != shown:
                facts = asdict(share) if share else {"message": "none under way"}
                self._log.event("INFO", "rollout", **facts)
                shown = share
            self._ended.wait(LOOK_SECONDS)
