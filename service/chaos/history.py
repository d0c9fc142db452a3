"""What happened in a campaign, as one JSON line each, in the order in which it ended.

Times are seconds since the campaign began.
"""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

R = TypeVar("R", bound="Record")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A line of a history."""

    record: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class Attempt(Record):
    """A request as its client saw it; one that broke off may be tried again."""

    record: ClassVar[str] = "attempt"
    request: int
    attempt: int
    time: float  # when it began
    seconds: float  # from the last byte sent to the last received
    form: str
    target: str
    statuses: tuple[int, ...]  # of which one is right; none if the client hangs up
    status: int = 0  # 0: no answer
    right: str = ""  # the class of the image, and the file's name if the request has one
    answered: str = ""  # likewise
    answer_id: str = ""
    reason: str = ""  # the type of an error
    error: str = ""  # why there is no answer
    surplus: int = 0  # bytes after the answer

    @property
    def end(self) -> float:
        """Not before the answer was there."""
        return self.time + self.seconds


@dataclass(frozen=True, kw_only=True)
class Fault(Record):
    """A fault that was injected, and whether everything was as before afterwards."""

    record: ClassVar[str] = "fault"
    fault: str
    replica: int
    seconds: float
    calm: float
    begin: float
    end: float
    recovered: float | None  # the time; None: not within its limit
    detail: str = ""
    possible: bool = True  # on this machine
    cleared: float | None = None  # seconds after kill -9 until nothing of a launcher was left


@dataclass(frozen=True, kw_only=True)
class Ended(Record):
    """A launcher ended, whether by a fault or not."""

    record: ClassVar[str] = "ended"
    time: float
    replica: int
    status: int


@dataclass(frozen=True, kw_only=True)
class Usage(Record):
    """What a process used at a moment."""

    record: ClassVar[str] = "usage"
    time: float
    process: str  # java, worker, …, and whose
    pid: int
    rss: int  # bytes
    descriptors: int


@dataclass(frozen=True, kw_only=True)
class Left(Record):
    """Something that was still there after everything had been stopped."""

    record: ClassVar[str] = "left"
    what: str


@dataclass(frozen=True, kw_only=True)
class Monitored(Record):
    """From this time on a Prometheus evaluated the alerts."""

    record: ClassVar[str] = "monitored"
    time: float


@dataclass(frozen=True, kw_only=True)
class Alert(Record):
    """An alert was pending or firing for some time."""

    record: ClassVar[str] = "alert"
    alert: str  # its name
    state: str
    instance: str  # HOST:PORT; "" if it is about all of them
    begin: float
    end: float
    replica: int = -1  # the one of the instance; -1: all


RECORDS = {cls.record: cls for cls in (Attempt, Fault, Ended, Usage, Left, Monitored, Alert)}


@dataclass
class History:
    """Takes records from any thread, and writes them to a file if there is one."""

    path: Path | None = None
    records: list[Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begin()
        self._by_class = defaultdict[type[Record], list[Any]](list)
        for record in self.records:
            self._by_class[type(record)].append(record)
        self._lock = threading.Lock()
        self._file = self.path.open("w", encoding="utf-8") if self.path else None

    def begin(self) -> None:
        """From now on."""
        self._began = time.monotonic()

    def now(self) -> float:
        return round(time.monotonic() - self._began, 3)

    def add(self, record: Record) -> None:
        with self._lock:
            self.records.append(record)
            self._by_class[type(record)].append(record)
            if self._file:
                self._file.write(to_line(record) + "\n")
                self._file.flush()

    def of(self, cls: type[R]) -> list[R]:
        """Its records of one class; the checker asks for the faults at each attempt."""
        return self._by_class[cls]


def to_line(record: Record) -> str:
    return json.dumps({"record": record.record} | asdict(record))


def from_lines(lines: Iterable[str]) -> History:
    """The history that a file holds."""
    history = History()
    for line in lines:
        facts: dict[str, Any] = json.loads(line)
        if "statuses" in facts:
            facts["statuses"] = tuple(facts["statuses"])
        history.add(RECORDS[facts.pop("record")](**facts))
    return history
