"""What ./scripts/predict --output keeps: a line of JSON for each image, in a file that goes on.

Each record is the server's answer with the image's name, size and SHA-256. It is written in one
piece as soon as the answer is there, so a client that is killed leaves at most a torn last line.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from handler.errors import SetupError
from service.bulk.sources import Image
from service.temporary import is_at

Record = dict[str, Any]
Key = tuple[str, str]  # name and SHA-256 of an image
# Statuses that are not about the image: a request that is refused so may be answered later, or
# by a server that is told something else.
ABOUT_THE_REQUEST = {401, 403, 404, 405, 408, 425, 429}


def is_final(record: Record) -> bool:
    """Whether the server has said all there is about the image: its classes, or that it is bad."""
    if record["status"] == "success":
        return True
    code = record.get("code")
    refused = isinstance(code, int) and 400 <= code < 500 and code not in ABOUT_THE_REQUEST
    return refused and record.get("type") != "InvalidTopK"


class Results:
    """The file, open for more; a context manager.

    `done` are the images that need not be sent again: one that failed for want of a server is
    forgotten when the file is opened, and so is a torn last line.
    """

    def __init__(self, path: Path) -> None:
        """Raises SetupError if the file is no such file, or in use; OSError."""
        self.path = path
        self.done: set[Key] = set()
        with ExitStack() as stack:
            old: IO[bytes] = stack.enter_context(path.open("ab+"))
            _lock(old, path)
            if not is_at(old.fileno(), path):  # it was replaced since
                raise in_use(path)
            kept = sum(map(len, self._kept(old)))
            if kept == path.stat().st_size:
                stack.pop_all()
                self._file: IO[bytes] = old
            else:
                self._file = self._replaced(self._kept(old))

    def _kept(self, file: IO[bytes]) -> Iterator[bytes]:
        """The lines that stay; `done` is what is in them."""
        self.done.clear()
        file.seek(0)
        for line in file:
            record = _parse(line, self.path)
            if record is not None and is_final(record):
                key = record["image"], record["sha256"]
                if key not in self.done:
                    self.done.add(key)
                    yield line

    def _replaced(self, lines: Iterable[bytes]) -> IO[bytes]:
        """The file with these lines alone; it is either the old one or the new, at any moment."""
        new = self.path.with_name(f"{self.path.name}.tmp")
        file = new.open("wb")
        _lock(file, self.path)
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
        new.replace(self.path)
        return file

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def claim(self, image: Image) -> bool:
        """Whether it is new; the same image under the same name is not, from now on."""
        key = image.label, image.sha256
        is_new = key not in self.done
        self.done.add(key)
        return is_new

    def add(self, image: Image, answer: dict[str, Any]) -> None:
        """Write what became of an image. Raises OSError, if the disk is full for example."""
        known = image.problem is None
        facts: Record = {
            "image": image.label,
            "bytes": len(image.body) if known else None,
            "sha256": image.sha256 if known else None,
        }
        self._file.write(json.dumps(facts | answer).encode() + b"\n")
        self._file.flush()

    def records(self) -> Iterator[Record]:
        """All that is in the file, from its beginning."""
        with self.path.open("rb") as file:
            for line in file:
                record = _parse(line, self.path)
                if record is not None:
                    yield record


def _parse(line: bytes, path: Path) -> Record | None:
    """A record; None if the line is torn. Raises SetupError if somebody else wrote the file."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
        if {"image", "bytes", "sha256", "status"} <= record.keys():
            return dict(record)
    except (ValueError, AttributeError):
        pass
    raise SetupError(f"{path} has lines that ./scripts/predict did not write: name another file")


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise in_use(path) from None


def in_use(path: Path) -> SetupError:
    return SetupError(f"{path}: another ./scripts/predict is writing to it")
