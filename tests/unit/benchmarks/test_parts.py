"""Parts of a benchmark as processes of their own: their rows, their limits and how they fail."""

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.parts import Found, Part, planned, run_part, seconds_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

COLUMNS = {"batch": 5, "rate": 6}


def part(code: str, **more: float) -> Part:
    facts = {"start_seconds": 0.0, "measurements": 0} | more
    command = [sys.executable, "-c", code, "{seconds}"]
    return Part(name="p", what="A part", command=command, columns=COLUMNS, **facts)  # type: ignore[arg-type]


def run(code: str, folder: Path, limit: float = 30) -> Found:
    return run_part(part(code), 0.5, limit, dict(os.environ), folder)


def test_rows_are_kept_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = """
import json, sys
print("Some library says this")
print(json.dumps({"batch": 8, "rate": float(sys.argv[1])}))
print(json.dumps({"batch": 64, "reason": "no memory"}))
"""
    found = run(code, tmp_path)
    assert found["rows"] == [{"batch": 8, "rate": 0.5}, {"batch": 64, "reason": "no memory"}]
    assert found["failed"] is None
    assert capsys.readouterr().out.splitlines() == [
        "",
        "A part (at most 30 s)",
        "batch    rate",
        "8      0.5000",
        "64          -  no memory",
    ]


def test_a_part_that_hangs_is_ended_with_its_children_and_its_rows_are_kept(tmp_path: Path) -> None:
    code = """
import json, signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(json.dumps({"batch": child.pid}), flush=True)
time.sleep(600)
"""
    part_of_it = part(code)
    began = time.monotonic()
    found = run_part(part_of_it, 0.5, 5, dict(os.environ), tmp_path)
    assert found["failed"] == "not done within 5 s"
    assert time.monotonic() - began < 40
    (row,) = found["rows"]
    assert not psutil.pid_exists(row["batch"]) or (
        psutil.Process(row["batch"]).status() == psutil.STATUS_ZOMBIE
    )


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.abort()", "ended by signal 6"),
        ("raise ValueError('the driver is too old')", "ValueError: the driver is too old"),
        ("import sys; sys.exit('error: no model')", "error: no model"),
    ],
)
def test_a_part_that_fails_says_why(tmp_path: Path, code: str, reason: str) -> None:
    found = run(f"print('{{\"batch\": 1}}', flush=True); {code}", tmp_path)
    assert (found["rows"], found["failed"]) == ([{"batch": 1}], reason)


def test_a_part_without_time_is_not_begun(tmp_path: Path) -> None:
    found = run("raise SystemExit(1)", tmp_path, limit=-3.0)
    assert (found["rows"], found["failed"]) == ([], "not begun: no time is left")


def test_measurements_are_as_long_as_they_fit() -> None:
    parts = [part("", start_seconds=20, measurements=4), part("", start_seconds=10, measurements=6)]
    seconds = seconds_of(parts, 1, 60)
    assert sum(planned(each, seconds) for each in parts) == pytest.approx(0.9 * 60)
    assert seconds_of(parts, 10, 5) == 5
    assert seconds_of(parts, 0.1, 5) == 1
