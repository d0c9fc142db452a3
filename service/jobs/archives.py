"""Archives taken apart in a process of its own, so that a hostile one costs no more than that."""

import asyncio
import errno
import json
import os
import resource
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

from service.jobs.spool import Limits, Refused, Spool

ROOT = Path(__file__).resolve().parents[2]
UNPACK = (
    f"import sys; sys.path[0] = {str(ROOT)!r}; "
    "from service.jobs.archives import unpack_from; unpack_from(sys.stdin.buffer)"
)
MAX_MEMORY = 512 * 2**20  # address space; Python and a list of 10,000 names take 60 MB
MAX_CPU_SECONDS = 120
MAX_OTHERS = 10_000  # folders, links and the like besides the images
CHUNK = 2**16
ZIP, GZIP = b"PK", b"\x1f\x8b"
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)  # its errors, and not the archive's
BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError)


async def unpack(archive: Path, spool: Spool, limits: Limits) -> tuple[int, int, str]:
    """Write the images of a zip or a tar into a spool's folder; their count, bytes and digest.

    Raises Refused, or OSError if the disk fails.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        UNPACK,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    asked = {"archive": str(archive), "folder": str(spool.path), "limits": vars(limits)}
    try:
        told, _ = await process.communicate(json.dumps(asked).encode())
    finally:
        if process.returncode is None:  # nobody waits for the answer any more
            process.kill()
    if process.returncode != 0:  # over a limit of memory or time, for one
        raise Refused(400, "UnreadableArchive", "the archive cannot be read, or takes too long")
    facts = json.loads(told)
    if "disk" in facts:
        raise OSError(facts["disk"], os.strerror(facts["disk"]), str(spool.path))
    if "refused" in facts:
        raise Refused(*facts["refused"])
    return facts["count"], facts["bytes"], facts["digest"]


def unpack_from(source: BinaryIO) -> None:
    """What the process does: one object of JSON in, one out."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_SECONDS, MAX_CPU_SECONDS))
    asked = json.loads(source.read())
    spool = Spool(Path(asked["folder"]), Limits(**asked["limits"]))
    try:
        for name, file in files_in(Path(asked["archive"])):
            spool.begin(name)
            while data := file.read(CHUNK):
                spool.write(data)
            spool.end()
        spool.flush()
        facts = {"count": spool.count, "bytes": spool.bytes, "digest": spool.digest}
    except Refused as exc:
        facts = {"refused": [exc.status, exc.type, str(exc)]}
    except (*BROKEN, RuntimeError, NotImplementedError) as exc:  # encrypted, or compressed oddly
        facts = {
            "refused": [400, "UnreadableArchive", "the body cannot be read as a zip, tar or tar.gz"]
        }
        if isinstance(exc, OSError) and exc.errno in DISK:
            facts = {"disk": exc.errno}
    print(json.dumps(facts))


def files_in(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """The regular files of an archive by their names, in order, without those that macOS adds."""
    with path.open("rb") as file:
        magic = file.read(2)
    if magic == ZIP:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if not entry.is_dir() and not is_noise(entry.filename):
                    with archive.open(entry) as opened:
                        yield entry.filename, opened
        return
    others = 0
    with tarfile.open(path, "r|gz" if magic == GZIP else "r|") as archive:
        for member in archive:
            archive.members.clear()  # type: ignore[attr-defined]  # else it keeps each
            found = archive.extractfile(member) if member.isfile() else None
            if found is not None and not is_noise(member.name):
                yield member.name, found
            elif (others := others + 1) > MAX_OTHERS:
                raise Refused(400, "UnreadableArchive", "there are too many folders and links")


def is_noise(name: str) -> bool:
    """What the Finder of macOS puts into archives."""
    last = name.rpartition("/")[2]
    return name.startswith("__MACOSX/") or last.startswith("._") or last == ".DS_Store"
