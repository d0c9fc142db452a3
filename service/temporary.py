"""Temporary folders of which a killed process leaves none for longer than until the next start.

A Guardian removes the folder of its launcher. This is for the case that it cannot: it was killed as
well, or the machine lost its power.
"""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

OWNER = ".owner"  # a file in the folder, locked as long as somebody uses it


class TemporaryFolder:
    """A new folder, and none of the same prefix beside it whose users have all ended.

    As a context manager it is removed at the end. `lock` is a descriptor: a process that inherits
    it uses the folder too, and keeps it if this process is killed.
    """

    def __init__(self, prefix: str, parent: Path | None = None) -> None:
        """`parent`: None is TMPDIR. Raises OSError."""
        parent = parent or Path(tempfile.gettempdir())
        sweep(parent, prefix)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            self.lock = os.open(self.path / OWNER, os.O_RDWR | os.O_CREAT, 0o600)
            with suppress(OSError):  # a file system without locks, on which nothing is swept
                fcntl.flock(self.lock, fcntl.LOCK_EX)
            if is_at(self.lock, self.path / OWNER):
                return
            os.close(self.lock)  # another process has found the folder before the lock was there

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """The folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock)


def sweep(parent: Path, prefix: str) -> None:
    """Remove the folders that were made here with this prefix and that nobody uses any more.

    Folders without the file are not ours, and those of other users cannot be opened.
    """
    for file in parent.glob(f"{prefix}*/{OWNER}"):
        with suppress(OSError):
            lock = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_at(lock, file):
                    shutil.rmtree(file.parent, ignore_errors=True)
            finally:
                os.close(lock)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether it is the file at this path that is open."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False
