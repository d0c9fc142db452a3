"""The folder of images: each job has one in it, written as a whole before the job is accepted.

It is the record of what was accepted: whatever Redis loses, a job that it does not know is put back
from here.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ENDED = "ended"  # a file in the folder of a job that has ended
NEW = ".new-"  # begins the name of a folder that is being written
MAX_NAME = 255  # characters


class Refused(Exception):
    """A request that is not answered with what it asks for; the message is for the client."""

    def __init__(self, status: int, type: str, message: str) -> None:
        super().__init__(message)
        self.status, self.type = status, type


class Image(NamedTuple):
    """An image of a job: bytes in its folder, or a URL."""

    name: str
    at: int
    size: int
    url: str


@dataclass(frozen=True)
class Limits:
    images: int
    image_bytes: int
    bytes: int


class Spool:
    """The images of a new job, written one after another; a context manager.

    Unless commit() has moved the folder, it is removed at the end.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path = path
        self.count = self.bytes = 0
        self._limits = limits
        self._digest = hashlib.sha256()
        self._images = (path / "images").open("wb")
        self._index = (path / "index").open("w", encoding="utf-8")

    @classmethod
    def create(cls, folder: Path, limits: Limits) -> "Spool":
        return cls(Path(tempfile.mkdtemp(prefix=NEW, dir=folder)), limits)

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._images, self._index):
            with suppress(OSError):  # what is left in memory finds no room on a full disk
                file.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def begin(self, name: str) -> None:
        """Begin an image. Raises Refused if the job has too many."""
        self._count()
        self._name = name[:MAX_NAME].encode("utf-8", "replace").decode()
        self._at = self.bytes

    def write(self, data: bytes) -> None:
        """A part of its bytes. Raises Refused if it or the job has too many."""
        self.bytes += len(data)
        if self.bytes - self._at > self._limits.image_bytes:
            raise Refused(
                413,
                "RequestTooLarge",
                f"{self._name} has more than {self._limits.image_bytes} bytes",
            )
        if self.bytes > self._limits.bytes:
            raise Refused(
                413, "RequestTooLarge", f"the job has more than {self._limits.bytes} bytes"
            )
        self._images.write(data)
        self._digest.update(data)

    def end(self) -> None:
        self._add(self._name, at=self._at, size=self.bytes - self._at)

    def add_url(self, url: str) -> None:
        """Raises Refused if the job has too many."""
        self._count()
        self._add(url, url=url)

    def _count(self) -> None:
        if self.count >= self._limits.images:
            raise Refused(
                413, "TooManyImages", f"the job has more than {self._limits.images} images"
            )
        self.count += 1

    def _add(self, name: str, **facts: Any) -> None:
        line = json.dumps({"name": name} | facts)
        self._index.write(line + "\n")
        self._digest.update(line.encode())

    @property
    def digest(self) -> str:
        """Of names and bytes, however they came."""
        return self._digest.hexdigest()

    def flush(self) -> None:
        """Put everything on the disk."""
        for file in (self._images, self._index):
            file.flush()
            os.fsync(file.fileno())

    def commit(self, job: dict[str, Any]) -> bool:
        """Make it the folder of this job, on the disk; False if that is there already."""
        self.flush()
        with (self.path / "job.json").open("w", encoding="utf-8") as file:
            json.dump(job, file)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(self.path)
        try:
            self.path.rename(self.path.parent / job["id"])  # fails if that has files
        except OSError as exc:
            if exc.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise
        _sync_folder(self.path.parent)
        return True


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_job(folder: Path, job_id: str) -> dict[str, Any] | None:
    """What commit() was given, or None."""
    try:
        return json.loads((folder / job_id / "job.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None


def read_index(folder: Path, job_id: str) -> list[Image]:
    """Raises OSError if the folder is gone, or ValueError if it is damaged."""
    found = []
    for line in (folder / job_id / "index").read_text("utf-8").splitlines():
        facts = json.loads(line)
        found.append(
            Image(facts["name"], facts.get("at", 0), facts.get("size", 0), facts.get("url", ""))
        )
    return found


def read_image(folder: Path, job_id: str, image: Image) -> bytes:
    """Raises OSError if the folder is gone."""
    with (folder / job_id / "images").open("rb") as file:
        file.seek(image.at)
        return file.read(image.size)


def keep_fetched(folder: Path, job_id: str, index: int, data: bytes) -> None:
    """Keep an image by URL until it is classified, if the disk has room for it."""
    path = _fetched(folder, job_id, index)
    part = path.with_suffix(".part")  # so that a kill leaves no half of it
    try:
        part.write_bytes(data)
        part.rename(path)
    except OSError:
        with suppress(OSError):
            part.unlink()


def read_fetched(folder: Path, job_id: str, index: int) -> bytes | None:
    try:
        return _fetched(folder, job_id, index).read_bytes()
    except OSError:
        return None


def drop_fetched(folder: Path, job_id: str, index: int) -> None:
    with suppress(OSError):
        _fetched(folder, job_id, index).unlink()


def _fetched(folder: Path, job_id: str, index: int) -> Path:
    return folder / job_id / f"url-{index}"


def mark_ended(folder: Path, job_id: str) -> None:
    """Note that a job must not begin again, also when Redis has forgotten it."""
    with suppress(OSError):
        (folder / job_id / ENDED).touch()


def has_ended(folder: Path, job_id: str) -> bool:
    return (folder / job_id / ENDED).exists()


def jobs_in(folder: Path) -> list[str]:
    """The ids of the jobs."""
    return sorted(path.parent.name for path in folder.glob("[!.]*/job.json"))


def forget_arriving(folder: Path) -> None:
    """Remove what an earlier server was still writing when it was killed."""
    for path in folder.glob(f"{NEW}*"):
        shutil.rmtree(path, ignore_errors=True)


def remove(folder: Path, job_id: str) -> None:
    shutil.rmtree(folder / job_id, ignore_errors=True)


def used_bytes(folder: Path) -> int:
    """What all images take, those that are being written included."""
    total = 0
    for path in folder.glob("*/*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total
