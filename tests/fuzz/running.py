"""Runs targets, each in a process of its own, and reads what came of it."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT
from tests.fuzz.worker import CURRENT, HANG_SECONDS, HEADER

MEMORY = Path("/dev/shm")  # files there cost no disk
START_SECONDS = 120  # to import everything, on a busy machine
TAIL = 2000  # characters of a process's last words
COLUMNS = "{:<13}{:>11}{:>9}{:>9}{:>10}{:>10}{:>10}"


@dataclass(frozen=True)
class Result:
    """What fuzzing one target came to."""

    name: str
    executions: int
    seconds: float
    branches: int | None  # reached, of those instrumented; None without atheris
    rss_mb: int | None  # at most
    findings: list[Path]  # inputs, each with its traceback beside it as .txt

    def text(self, path: Path) -> str:
        return path.with_suffix(".txt").read_text("utf-8")


def run(name: str, executions: int, seconds: int, seed: int) -> Result:
    """Fuzz a target; if it finds anything, that stays in a temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    log = folder / "log"
    command = [sys.executable, "-m", "tests.fuzz.worker", name]
    command += [str(executions), str(seconds), str(seed), str(folder)]
    started = time.monotonic()
    limit = seconds + START_SECONDS + HANG_SECONDS if seconds else None
    inputs = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
    with log.open("wb") as file, inputs as name_of_inputs:  # libFuzzer leaves them behind
        try:
            done: int | str = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | {"TMPDIR": name_of_inputs},
                stdout=file,
                stderr=file,
                timeout=limit,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            done = "was killed, as it did not end"
    elapsed = time.monotonic() - started
    said = log.read_text("utf-8", "replace")
    found = {kind: int(number) for kind, number in re.findall(r"stat::(\w+):\s*(\d+)", said)}
    branches = re.findall(r"cov: (\d+)", said)
    if done != 0:
        keep_last_input(folder, f"{name}: exit status {done}\n{said[-TAIL:]}")
    findings = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.with_suffix(".txt").is_file() and path.suffix != ".txt"
    )
    if not findings:
        shutil.rmtree(folder)
    return Result(
        name,
        found.get("number_of_executed_units", 0),
        elapsed,
        int(branches[-1]) if branches else None,
        found.get("peak_rss_mb"),
        findings,
    )


def keep_last_input(folder: Path, why: str) -> None:
    """The input that ended a process: libFuzzer's file, or what was in memory."""
    kept = [*folder.glob("crash-*"), *folder.glob("timeout-*"), *folder.glob("oom-*")]
    if not kept:
        kept = [folder / "died"]
        current = folder / CURRENT
        data = current.read_bytes() if current.is_file() else b""
        length = int.from_bytes(data[:HEADER], "little")
        kept[0].write_bytes(data[HEADER : HEADER + length])
    for path in kept:
        path.with_suffix(".txt").write_text(why, "utf-8")


def describe(results: Sequence[Result], head: bool = True) -> str:
    """A table; seconds are those of the whole process, with its start."""
    titles = ("target", "executions", "seconds", "1/s", "branches", "peak MB", "findings")
    lines = [COLUMNS.format(*titles)] if head else []
    for result in results:
        each = (
            result.name,
            result.executions,
            f"{result.seconds:.0f}",
            f"{result.executions / result.seconds:.0f}",
            "-" if result.branches is None else result.branches,
            "-" if result.rss_mb is None else result.rss_mb,
            len(result.findings),
        )
        lines.append(COLUMNS.format(*each))
    return "\n".join(lines)
