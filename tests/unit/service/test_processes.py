"""Child processes, which always end, and the signals that stop a command."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from service.processes import Guardian, end, wait_until
from tests import ROOT, skip
from tests.processes import alive

# Starts a server that has a child and ignores SIGTERM, tells its pid, and waits.
LAUNCHER = """
import subprocess, sys
from service.processes import Guardian
guardian = Guardian(sys.argv[1])
command = ["sh", "-c", "trap '' TERM; sleep 600 & echo up; wait"]
server = guardian.start(command, stdout=subprocess.PIPE)
server.stdout.readline()
print(server.pid, flush=True)
sys.stdin.readline()
server.kill()
guardian.dismiss()
"""
STOPPED = """
import signal, sys
from service.processes import on_stop
on_stop(lambda number, _: sys.exit(f"stopped by {number}"))
on_stop(lambda number, _: sys.exit(f"stopped by {number}"))  # as serve does, twice
signal.raise_signal(getattr(signal, sys.argv[1]))
sys.exit("goes on")
"""


@contextmanager
def launcher(
    folder: Path, env: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A launcher, and the processes that its server consists of."""
    folder.mkdir()
    (folder / "archive").write_text("28 MB")
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | dict(env or {}),
    )
    assert process.stdout is not None
    server = psutil.Process(int(process.stdout.readline()))
    started = [server, *server.children()]
    assert len(started) == 2
    try:
        yield process, started
    finally:
        process.kill()
        for child in alive(started):
            child.kill()
        process.communicate()


def guardians(folder: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"] and process.info["cmdline"][-1] == str(folder)
        if process.info["cmdline"][0] == "/bin/sh"
    ]


def wait_until_gone(processes: list[psutil.Process], seconds: float = 10) -> None:
    assert wait_until(lambda: not alive(processes), seconds), alive(processes)


def test_nothing_is_left_of_a_launcher_that_was_killed(tmp_path: Path) -> None:
    """A folder with a space and a quote in its name: it is no part of the shell's program."""
    folder = tmp_path / "a 'folder'"
    with launcher(folder) as (process, started):
        (guardian,) = guardians(folder)
        # A signal to the launcher's group, or its terminal's end, spares the guardian.
        assert os.getpgid(guardian.pid) != os.getpgid(process.pid)
        assert os.getsid(guardian.pid) != os.getsid(process.pid)
        process.kill()
        wait_until_gone([*started, guardian])
        assert not folder.exists()


def test_nothing_else_is_killed_whatever_the_environment_says(tmp_path: Path) -> None:
    """The names of the shell's variables are in nobody's hands."""
    bystander = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        env = {"groups": f"-{bystander.pid}", "line": str(bystander.pid)}
        with launcher(tmp_path / "folder", env) as (process, started):
            process.kill()
            wait_until_gone(started)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_guardian_that_is_dismissed_does_nothing(tmp_path: Path) -> None:
    """What was in the group by then may be somebody else's: numbers of processes come again."""
    folder = tmp_path / "folder"
    with launcher(folder) as (process, started):
        (guardian,) = guardians(folder)
        process.communicate("stop\n", timeout=10)
        wait_until_gone([guardian])
        assert folder.exists()
        assert alive(started) == started[1:], "the launcher has killed the first, and nobody more"


def test_a_launcher_whose_guardian_is_gone_goes_on(tmp_path: Path) -> None:
    with launcher(tmp_path / "folder") as (process, _):
        (guardian,) = guardians(tmp_path / "folder")
        guardian.kill()
        wait_until_gone([guardian])
        process.communicate("stop\n", timeout=10)
        assert process.returncode == 0


def test_what_a_launcher_has_started_ends_with_it_though_its_guardian_is_gone(
    tmp_path: Path,
) -> None:
    """By the kernel; its children are left, and what they have is the next start's to remove."""
    if sys.platform != "linux":
        skip("only Linux ends a process with its parent")
    with launcher(tmp_path / "folder") as (process, started):
        (guardian,) = guardians(tmp_path / "folder")
        guardian.kill()
        process.kill()
        wait_until_gone(started[:1])


def test_what_a_thread_has_started_outlives_it(tmp_path: Path) -> None:
    """The kernel would take the thread for the parent."""
    with Guardian() as guardian:
        started: list[subprocess.Popen[bytes]] = []
        thread = threading.Thread(target=lambda: started.append(guardian.start(["sleep", "600"])))
        thread.start()
        thread.join()
        time.sleep(0.3)
        assert started[0].poll() is None


def test_what_was_started_ends_with_the_block(tmp_path: Path) -> None:
    with Guardian() as guardian:
        process = guardian.start(["sh", "-c", "sleep 600 & wait"])
        started = psutil.Process(process.pid)
        assert wait_until(started.children, 10)
        family = [started, *started.children()]
    assert process.returncode == -signal.SIGTERM
    wait_until_gone(family)


@pytest.mark.parametrize(
    ("ignored", "in_time", "status"),
    [("", True, -signal.SIGTERM), ("TERM", False, -signal.SIGKILL)],
)
def test_a_process_that_does_not_end_is_killed(ignored: str, in_time: bool, status: int) -> None:
    with Guardian() as guardian:
        command = ["sh", "-c", f"trap '' {ignored or 'USR1'}; echo up; exec sleep 600"]
        process = guardian.start(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert end(process, seconds=0.2) is in_time
        assert process.returncode == status


def test_waiting_ends_with_the_condition_or_the_deadline() -> None:
    results = iter([0, "", 7, 8])
    assert wait_until(lambda: next(results), 10, poll_seconds=0.001) == 7
    assert wait_until(lambda: None, 0.01, poll_seconds=0.001) is None


@pytest.mark.parametrize(
    ("shell", "signal", "said"),
    [
        ("", "SIGHUP", "stopped by 1"),
        ("", "SIGINT", "stopped by 2"),
        ("", "SIGTERM", "stopped by 15"),
        ("trap '' HUP; ", "SIGHUP", "goes on"),  # what nohup does
        ("trap '' HUP; ", "SIGTERM", "stopped by 15"),
        ("trap '' INT; ", "SIGINT", "stopped by 2"),  # what a shell does to its background jobs
    ],
)
def test_signals(shell: str, signal: str, said: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f'{shell}exec "$0" "$@"', sys.executable, "-c", STOPPED, signal],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.stderr.strip() == said
