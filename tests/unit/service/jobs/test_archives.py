"""Archives, taken apart in their own process. What is in them: tests/lifecycle/test_jobs.py."""

import asyncio
import errno
import zipfile
from pathlib import Path

import pytest

from service.jobs.archives import unpack
from service.jobs.spool import Limits, Spool

LIMITS = Limits(images=3, image_bytes=100, bytes=100)


def test_a_full_disk_is_no_fault_of_the_archive(tmp_path: Path) -> None:
    archive, folder = tmp_path / "archive", tmp_path / "new"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("0.jpg", b"image")
    folder.mkdir()
    (folder / "images").symlink_to("/dev/full")
    with Spool(folder, LIMITS) as new, pytest.raises(OSError, match="No space") as error:
        asyncio.run(unpack(archive, new, LIMITS))
    assert error.value.errno == errno.ENOSPC
