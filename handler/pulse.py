"""A worker's sign of life, for the launcher that watches it (service/torchserve/watchdog.py).

A process that was stopped, or native code that keeps Python's lock, silences every thread. Native
code that never returns and has released the lock does not: a worker whose batch makes no progress
ends itself, and TorchServe starts another.
"""

import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, process_time, sleep

from handler.logs import log_line

BEAT_SECONDS = 1.0
LATE_SECONDS = 2.0  # between two looks, of a process that was stopped or does not get its turn
PREFIX = ".pulse-"  # of a file in the model's folder, then the number of the process
HUNG_PREFIX = ".hung-"  # of what becomes of that file when the process is killed because it hangs
MIN_PATIENCE_SECONDS = 10.0
PATIENCE = (
    10  # longest steps; a WebP takes five times as long to decode as a blank JPEG of its size
)
IDLE_SHARE = 0.02  # of a core, above what this thread and that of the metrics need


class Pulse:
    """Touches a file every second, and ends the process if the current batch makes no progress."""

    def __init__(self, folder: Path, step_seconds: float | None) -> None:
        """`step_seconds` is what the longest step takes; None sets no limit to a step."""
        self._file = folder / f"{PREFIX}{os.getpid()}"
        self._patience = float("inf")
        if step_seconds is not None:
            self._patience = max(MIN_PATIENCE_SECONDS, PATIENCE * step_seconds)
        self._steps = 0  # of all batches; a step is over when the next begins
        self._busy = False  # with a batch
        # The step that `is_stuck` saw last, and when it did so first: by the clock, in CPU time.
        self._seen = 0, 0.0, 0.0
        self._looked = 0.0
        self._thread = 0  # the one that works on the batch

    @contextmanager
    def batch(self) -> Iterator[None]:
        """A batch is being answered. Waiting for readers of the log is no part of it."""
        self._thread = threading.get_ident()
        self.step()
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def step(self) -> None:
        """The batch makes progress: an image is decoded, or a forward pass done."""
        self._steps += 1

    def is_stuck(self) -> bool:
        """Whether the step takes too long, and not because the machine starves this process.

        To be called every second: a step counts from the first call that sees it, so that steps
        themselves, of which each image has some, need no clock. A call that comes late starts anew:
        the batch did not run meanwhile either. A starving process computes, and has not yet had its
        share of a core.
        """
        steps, clock, cpu_clock = self._steps, monotonic(), process_time()
        late, self._looked = clock - self._looked > LATE_SECONDS, clock
        if late or not self._busy or steps != self._seen[0]:
            self._seen = steps, clock, cpu_clock
            return False
        seconds, cpu_seconds = clock - self._seen[1], cpu_clock - self._seen[2]
        starving = IDLE_SHARE * seconds < cpu_seconds < self._patience
        return seconds > self._patience and not starving

    def start(self) -> None:
        """Beat from a thread of its own, because that of the metrics may wait for its readers."""
        try:
            self._file.touch()
        except OSError as exc:  # a worker that nobody watches is better than none
            log_line(logging.WARNING, "not_watched", message=str(exc))
            return
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def _run(self) -> None:
        told = False
        while True:
            sleep(BEAT_SECONDS)
            if not self.is_stuck():
                told = False
                with suppress(OSError):  # its folder goes when the model does
                    os.utime(self._file)  # needs no room on a disk that is full
            elif not told:
                told = True
                self._tell()  # and see a second later, when the line has been read
            else:
                with suppress(OSError):
                    self._file.replace(self._file.with_name(f"{HUNG_PREFIX}{os.getpid()}"))
                os._exit(1)

    def _tell(self) -> None:
        """Log where the batch stands. If that waits for a reader, the launcher sees no beat."""
        frame = sys._current_frames().get(self._thread)
        log_line(
            logging.ERROR,
            "worker_stuck",
            pid=os.getpid(),
            message=f"a batch has made no progress for {self._patience:.0f} s; this worker ends",
            cause="".join(traceback.format_stack(frame)) if frame else None,
        )


def count_hung(folder: Path) -> int:
    """How many workers were killed since the last one counted; each is counted once."""
    count = 0
    for mark in folder.glob(f"{HUNG_PREFIX}*"):
        with suppress(FileNotFoundError):  # another worker has
            mark.unlink()
            count += 1
    return count
