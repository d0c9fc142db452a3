"""Where the images of ./scripts/predict come from: files, folders, patterns, lists, archives.

Nothing is unpacked: members of an archive are read one after the other, into memory. Whoever made
an archive may have made it to fill that, so what is read of one, and at once, is bounded.
"""

import glob
import gzip
import hashlib
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from lzma import LZMAError
from pathlib import Path
from typing import IO, BinaryIO

from handler.errors import SetupError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
TARS = (".tar", ".tar.gz", ".tgz")
ARCHIVES = (".zip", *TARS)
MAX_IMAGE_BYTES = 64 * 2**20  # of one image; the server has a lower limit, unless it was raised
MAX_PATHS = 2_000_000
MAX_LINE = 4096  # bytes of a path in a list
MAX_NAME = 1024  # characters of a member's name
# What an archive may hold once it is decompressed: images hardly become smaller in one.
MAX_RATIO = 100
ALWAYS_ALLOWED = 2**30  # bytes

DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    LZMAError,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    ArithmeticError,
)  # fmt: skip - what the libraries raise for bytes that are no archive, or encrypted


@dataclass(frozen=True)
class Image:
    """The bytes of an image, or why there are none; `name` is its path, or archive/member."""

    name: str
    body: bytes = b""
    problem: tuple[str, str] | None = None  # type and message of an error

    @property
    def label(self) -> str:
        """The name as text, whatever bytes the file system has for it."""
        return self.name.encode("utf-8", "backslashreplace").decode()

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.body).hexdigest()


def expand(inputs: Iterable[Path], listed: BinaryIO) -> list[Path]:
    """The files and archives that are meant, in a fixed order.

    A folder stands for the images below it, a pattern for what it fits, and `-` for the paths in
    the lines of `listed`. Raises SetupError if an input does not exist, if there are more than
    MAX_PATHS files, or a line is too long.
    """
    found: list[Path] = []
    for path in _expand(inputs, listed):
        found.append(path)
        if len(found) > MAX_PATHS:
            raise SetupError(f"more than {MAX_PATHS} files at once: give them in several runs")
    return found


def _expand(inputs: Iterable[Path], listed: BinaryIO) -> Iterator[Path]:
    for given in inputs:
        if given == Path("-"):
            for path in _lines(listed):
                yield from _below(path)
        elif given.exists():
            yield from _below(given)
        else:
            fitting = sorted(glob.glob(str(given), recursive=True))  # noqa: PTH207 - absolute, too
            if not fitting:
                raise SetupError(f"{given} does not exist")
            for name in fitting:
                yield from _below(Path(name))


def _lines(listed: BinaryIO) -> Iterator[Path]:
    while line := listed.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise SetupError(f"a line of the list has more than {MAX_LINE} bytes")
        if text := line.rstrip(b"\r\n"):
            yield Path(os.fsdecode(text))


def _below(path: Path) -> Iterator[Path]:
    """The path, or the images in it if it is a folder; links to folders are not followed."""
    if not path.is_dir():
        yield path
        return
    errors: list[OSError] = []
    for folder, below, names in os.walk(path, onerror=errors.append):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(filter(is_image, names)):
            if (file := Path(folder, name)).is_file():  # no pipe, which would never end
                yield file
    for error in errors:
        yield Path(error.filename)  # which cannot be read, either


def is_image(name: str) -> bool:
    """By its suffix. Hidden files are none: macOS leaves ._dog.jpg beside dog.jpg."""
    last = name.rpartition("/")[2]
    return last.lower().endswith(SUFFIXES) and not last.startswith(".")


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ARCHIVES)


def read(paths: Iterable[Path]) -> Iterator[Image]:
    """The images one after the other, those in archives too. What cannot be read is a problem."""
    for path in paths:
        if not is_archive(path):
            yield read_file(path)
            continue
        members = _read_tar if path.name.lower().endswith(TARS) else _read_zip
        try:
            yield from members(path)
        except DAMAGED as exc:
            reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
            problem = f"the rest of the archive cannot be read: {reason}"
            yield Image(str(path), problem=("UnreadableArchive", problem))


def read_file(path: Path) -> Image:
    """One image, whatever its name is. What cannot be read is a problem."""
    try:
        with path.open("rb") as file:
            return _image(str(path), file)
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        reason = getattr(exc, "strerror", exc)
        return Image(str(path), problem=("UnreadableFile", str(reason)))


def _image(name: str, file: IO[bytes]) -> Image:
    body = file.read(MAX_IMAGE_BYTES + 1)
    if len(body) > MAX_IMAGE_BYTES:
        return Image(name, problem=("ImageTooLarge", f"more than {MAX_IMAGE_BYTES >> 20} MiB"))
    return Image(name, body)


def _read_zip(path: Path) -> Iterator[Image]:
    left = _allowed(path)
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not is_image(member.filename) or member.is_dir():
                continue
            name = _name_of(path, member.filename)
            try:
                with archive.open(member) as file:
                    image = _image(name, file)
            except DAMAGED as exc:
                image = Image(name, problem=("UnreadableFile", str(exc)))
            left -= len(image.body) or MAX_IMAGE_BYTES  # a broken one may have taken as much
            if left < 0:
                raise ValueError("it grows too much as it is decompressed")
            yield image


def _read_tar(path: Path) -> Iterator[Image]:
    with path.open("rb") as file:
        plain = file if path.suffix.lower() == ".tar" else gzip.GzipFile(fileobj=file)
        bounded = _Bounded(plain, _allowed(path))
        with tarfile.open(fileobj=bounded, mode="r:") as archive:  # type: ignore[call-overload]
            while (member := archive.next()) is not None:
                archive.members.clear()  # it would keep them all
                if member.isreg() and is_image(member.name):
                    content = archive.extractfile(member)
                    assert content is not None  # noqa: S101 - for mypy: it is a regular file
                    yield _image(_name_of(path, member.name), content)
            if any(bounded.last):  # tarfile takes a damaged header for the end, which is zeros
                raise tarfile.ReadError("a header is damaged")


class _Bounded:
    """A file of which only so much is read: what tarfile needs of one."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, limit: int) -> None:
        self._file, self._limit = file, limit
        self.tell = file.tell
        self.last = b""  # what was read last

    def read(self, size: int) -> bytes:
        if size > MAX_IMAGE_BYTES + 1:  # a header can ask for any number of bytes
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.last = self._file.read(size)
        return self.last

    def seek(self, position: int) -> int:
        if position > self._limit:
            raise tarfile.ReadError("it grows too much as it is decompressed")
        return self._file.seek(position)


def _allowed(archive: Path) -> int:
    return max(ALWAYS_ALLOWED, MAX_RATIO * archive.stat().st_size)


def _name_of(archive: Path, member: str) -> str:
    return f"{archive}/{member[-MAX_NAME:]}"
