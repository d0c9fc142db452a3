"""Child processes that never outlive their parent, and waiting for what they do."""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
STOP_SECONDS = 15

# Reads until the pipe ends, which the system closes however its writer ended: nothing is polled,
# and it is the same on Linux and macOS. It runs in the background, so that it is nobody's child.
# A process that is killed may be in the middle of making a file, so the folder goes a second later.
SCRIPT = """
groups=
exec 3<&0
{
    while read -r line; do
        if [ "$line" = dismissed ]; then exit; fi
        groups="$groups -$line"
    done
    kill -9 $groups
    sleep 1
    rm -rf "$0"
} <&3 3<&- &
"""


class Guardian:
    """A process that clears up if this one cannot: after kill -9, or if memory runs out.

    It waits for the end of this process, then kills what start() has started and removes a folder.
    As a context manager it ends what was started in any case. The folder remains the caller's to
    remove at an orderly end.
    """

    def __init__(self, folder: str | Path = "") -> None:
        """`folder` is the one to remove; "" is none."""
        self._started: list[subprocess.Popen[bytes]] = []
        reader, self._pipe = os.pipe()  # no child of ours inherits the end that we write to
        try:
            subprocess.run(
                ["/bin/sh", "-c", SCRIPT, folder and Path(folder).absolute()],
                stdin=reader,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,  # a signal to our group, or our terminal's end, spares it
                check=True,
            )
        finally:
            os.close(reader)

    def __enter__(self) -> "Guardian":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            end(process)
        self.dismiss()

    def start(
        self, command: Sequence[object], stdin: int = subprocess.DEVNULL, **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start a command with subprocess.Popen's options.

        It gets a session of its own: Ctrl-C reaches us alone, and its group can be ended as one.
        Raises OSError if it cannot be run.
        """
        process = subprocess.Popen(
            [*_bound(command[0]), *map(str, command)],
            stdin=stdin,
            start_new_session=True,
            **options,
        )
        self._tell(str(process.pid))
        self._started.append(process)
        return process

    def dismiss(self) -> None:
        """Let it do nothing: everything has ended, and the folder is gone."""
        self._tell("dismissed")
        os.close(self._pipe)

    def _tell(self, line: str) -> None:
        with suppress(BrokenPipeError):  # somebody has ended it: we go on without
            os.write(self._pipe, f"{line}\n".encode())


def _bound(program: object) -> list[str]:
    """What makes the kernel kill the command that follows when this process ends; Linux only.

    The guardian does that and more, but may be killed with us, by whoever ends all of a service's
    processes at once. The kernel means the thread that starts the command, so only ours that lives
    as long as we do counts.
    """
    setpriv = shutil.which("setpriv")  # of util-linux
    lasting = threading.current_thread() is threading.main_thread()
    if not (setpriv and lasting and shutil.which(str(program))):  # else Popen says what is wrong
        return []
    return [setpriv, "--pdeathsig", "KILL", "--"]


def end(
    process: subprocess.Popen[bytes],
    seconds: float = STOP_SECONDS,
    number: signal.Signals = signal.SIGTERM,
) -> bool:
    """Ask a process to end, then kill what is left of its group; False if it did not end in time.

    A KeyboardInterrupt (Ctrl-C, usually the second) kills at once, and is raised afterwards.
    """
    process.send_signal(number)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError):  # nothing is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return True


def wait_until(condition: Callable[[], T], seconds: float, poll_seconds: float = 0.1) -> T:
    """What `condition` returns as soon as that is true, or else its last result in time."""
    deadline = time.monotonic() + seconds
    while not (result := condition()) and time.monotonic() < deadline:
        time.sleep(poll_seconds)
    return result


def on_stop(handler: Callable[[int, FrameType | None], Any]) -> None:
    """Call a handler for Ctrl-C, SIGTERM and the end of the terminal, the last not under nohup."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
