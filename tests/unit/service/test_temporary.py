"""Temporary folders, which are removed when the last process that uses them has ended."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from service.temporary import OWNER, TemporaryFolder
from tests import ROOT
from tests.processes import alive, wait_for

# Makes a folder in the one that is named, starts a process that uses it too, and waits.
OWNS = """
import subprocess, sys
from pathlib import Path
from service.temporary import TemporaryFolder
folder = TemporaryFolder("torchserve-", Path(sys.argv[1]))
(folder.path / "archive").write_text("28 MB")
child = subprocess.Popen(["sleep", "600"], pass_fds=[folder.lock])
print(folder.path, child.pid, flush=True)
sys.stdin.readline()
"""


@contextmanager
def owner(parent: Path) -> Iterator[tuple[subprocess.Popen[str], Path, psutil.Process]]:
    """A process with a folder, and the one that it has started."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNS, str(parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    folder, pid = process.stdout.readline().split()
    child = psutil.Process(int(pid))
    try:
        yield process, Path(folder), child
    finally:
        process.kill()
        process.communicate()
        if alive([child]):
            child.kill()


def make(parent: Path, prefix: str = "torchserve-") -> None:
    """What the next start does first."""
    TemporaryFolder(prefix, parent).remove()


def test_a_folder_is_removed_with_its_content(tmp_path: Path) -> None:
    with TemporaryFolder("x-", tmp_path) as folder:
        (folder / "deep" / "er").mkdir(parents=True)
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_in_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with TemporaryFolder("x-") as folder:
        assert folder.parent == tmp_path


def test_what_a_killed_process_has_left_is_removed_when_no_process_uses_it(tmp_path: Path) -> None:
    """Its child, as Java is, may use the folder for longer than itself."""
    with owner(tmp_path) as (process, folder, child):
        make(tmp_path)
        assert (folder / "archive").exists(), "it lives"
        process.kill()
        process.wait()
        make(tmp_path)
        assert (folder / "archive").exists(), "its child lives"
        child.kill()
        wait_for(lambda: not alive([child]), 10)
        make(tmp_path, "gateway-")
        assert folder.exists(), "another name"
        make(tmp_path)
        assert not folder.exists()


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    other, nested = tmp_path / "torchserve-models", tmp_path / "mine" / "torchserve-old"
    other.mkdir()
    (other / "resnet.mar").touch()
    nested.mkdir(parents=True)
    (nested / OWNER).touch()
    link = tmp_path / "torchserve-link"  # to a file that somebody wants to be opened by us
    link.mkdir()
    (link / OWNER).symlink_to(other / "resnet.mar")
    make(tmp_path)
    assert (other / "resnet.mar").exists()
    assert (nested / OWNER).exists()
    assert link.exists()


def test_a_folder_that_is_swept_before_its_lock_is_there_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two starts at once: one has made its folder when the other sweeps."""
    swept: list[Path] = []
    flock = fcntl.flock

    def sweep_first(lock: int, operation: int) -> None:
        if not swept:
            [folder] = tmp_path.glob("x-*")
            swept.append(folder)
            shutil.rmtree(folder)
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", sweep_first)
    with TemporaryFolder("x-", tmp_path) as folder:
        assert folder not in swept
        assert list(tmp_path.iterdir()) == [folder]
