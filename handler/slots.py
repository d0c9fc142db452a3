"""Numbers of a model's workers, for the label `worker` of their metrics."""

import fcntl
from pathlib import Path
from typing import IO

_held: list[IO[str]] = []  # this process's locks, held until it ends


def claim_slot(folder: Path) -> str:
    """The lowest number that no other living worker has claimed in a folder.

    A worker that replaces another gets its number. So the label `worker` stays the same after a
    restart, and there are never more values than workers. (TorchServe's own numbers, those of the
    sockets, rise with each scaling up.) Raises OSError.
    """
    slot = 0
    while True:
        file = (folder / f".worker-{slot}").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            slot += 1
        else:
            _held.append(file)
            return str(slot)
