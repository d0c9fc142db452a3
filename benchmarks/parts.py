"""The parts of a benchmark: commands that print a row as soon as they have it, as a line of JSON.

Each part is a process of its own with a time limit. One that fails, hangs or crashes is a row with
its reason, and the others go on; the memory of the device is free again for the next.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.load.processes import Server, running
from service.tables import text_line

POLL_SECONDS = 0.1
MINIMUM_SECONDS = 5  # with less time left, a part is not begun
SHARE = 0.9  # of the time that is planned: starts differ

Row = dict[str, Any]
Found = dict[str, Any]  # of a part: rows, failed (a reason or None), seconds


@dataclass(frozen=True, kw_only=True)
class Part:
    """A command and how its rows are shown; `{seconds}` in it is the time of a measurement."""

    name: str
    what: str
    command: Sequence[object]
    columns: Mapping[str, int]  # of the table, and their widths
    start_seconds: float  # planned for everything but measuring
    measurements: int
    warmup_seconds: float = 0.0  # of each


def seconds_of(parts: Sequence[Part], minutes: float, most: float) -> float:
    """How long a measurement may take for all parts to fit into `minutes`; at least a second."""
    left = SHARE * 60 * minutes - sum(
        part.start_seconds + part.measurements * part.warmup_seconds for part in parts
    )
    return min(most, max(1.0, left / sum(part.measurements for part in parts)))


def planned(part: Part, seconds: float) -> float:
    """Seconds that a part is expected to take."""
    return part.start_seconds + part.measurements * (seconds + part.warmup_seconds)


def run_part(
    part: Part, seconds: float, limit_seconds: float, environ: Mapping[str, str], folder: Path
) -> Found:
    """Run a part, and show each row when it comes."""
    print(f"\n{part.what} (at most {max(0.0, limit_seconds):.0f} s)", flush=True)
    begin = time.monotonic()
    found: Found = {"rows": [], "failed": None, "seconds": 0.0}
    if limit_seconds < MINIMUM_SECONDS:
        found["failed"] = "not begun: no time is left"
    else:
        print(text_line(list(part.columns), list(part.columns.values())), flush=True)
        command = [str(word).replace("{seconds}", f"{seconds:g}") for word in part.command]
        place = Path(tempfile.mkdtemp(dir=folder))
        with running(command, environ, place) as server:
            for row in rows_until(server, begin + limit_seconds):
                found["rows"].append(row)
                print(line_of(row, part.columns), flush=True)
            found["failed"] = reason_of(server, limit_seconds)
    if found["failed"]:
        print(f"failed: {found['failed']}", flush=True)
    found["seconds"] = time.monotonic() - begin
    return found


def rows_until(server: Server, deadline: float) -> Iterator[Row]:
    """The rows that a part prints, until it ends or the deadline, of time.monotonic, is over."""
    shown = 0
    while True:
        last = server.has_ended() or time.monotonic() >= deadline
        complete = server.log.read_text("utf-8", "replace").rpartition("\n")[0].split("\n")
        for line in complete[shown:]:
            if line.startswith("{"):
                yield json.loads(line)
        shown = max(shown, len(complete) if complete != [""] else 0)
        if last:
            return
        time.sleep(POLL_SECONDS)


def reason_of(server: Server, limit_seconds: float) -> str | None:
    """Why a part did not come to its end; None if it did."""
    if not server.has_ended():
        return f"not done within {limit_seconds:.0f} s"
    status = server.process.returncode
    if status == 0:
        return None
    return f"ended by signal {-status}" if status < 0 else server.last_lines()


def line_of(row: Row, columns: Mapping[str, int]) -> str:
    """A row of the table; one with a reason in place of figures ends with it."""
    cells = [row.get(name) for name in columns]
    # Shares and differences need more digits than rates.
    cells = [f"{cell:.4f}" if isinstance(cell, float) and cell < 2 else cell for cell in cells]
    line = text_line(cells, list(columns.values()))
    return f"{line}  {row['reason']}" if row.get("reason") else line


def print_row(**row: Any) -> None:
    """What a part does with each of its rows."""
    print(json.dumps(row), flush=True)
