"""The folder of a job: written as a whole or not at all, and the same twice."""

import errno
from pathlib import Path

import pytest

from service.jobs import spool
from service.jobs.spool import Limits, Refused, Spool

LIMITS = Limits(images=3, image_bytes=10, bytes=25)


def add(new: Spool, *images: bytes) -> None:
    for i, image in enumerate(images):
        new.begin(f"{i}.jpg")
        new.write(image[:4])
        new.write(image[4:])
        new.end()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with Spool.create(tmp_path, LIMITS) as new:
        add(new, b"first", b"", b"the third")
        assert spool.jobs_in(tmp_path) == []
        assert new.commit({"id": "a" * 32, "client": "alice"})
    assert spool.jobs_in(tmp_path) == ["a" * 32]
    assert spool.read_job(tmp_path, "a" * 32) == {"id": "a" * 32, "client": "alice"}
    index = spool.read_index(tmp_path, "a" * 32)
    assert [image.name for image in index] == ["0.jpg", "1.jpg", "2.jpg"]
    read = [spool.read_image(tmp_path, "a" * 32, image) for image in index]
    assert read == [b"first", b"", b"the third"]
    assert spool.used_bytes(tmp_path) > 14
    spool.remove(tmp_path, "a" * 32)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_committed_leaves_nothing(tmp_path: Path) -> None:
    with Spool.create(tmp_path, LIMITS) as new:
        add(new, b"first")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "images").symlink_to("/dev/full")
    with Spool(folder, LIMITS) as new:
        add(new, b"first")
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_one_id_stays(tmp_path: Path) -> None:
    for image, is_first in [(b"first", True), (b"second", False)]:
        with Spool.create(tmp_path, LIMITS) as new:
            add(new, image)
            assert new.commit({"id": "a"}) is is_first
    [kept] = spool.read_index(tmp_path, "a")
    assert spool.read_image(tmp_path, "a", kept) == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_disk_that_fails_is_no_job_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: Path, _target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", fail)
    with Spool.create(tmp_path, LIMITS) as new, pytest.raises(OSError, match="No space"):
        new.commit({"id": "a"})


def test_one_that_has_ended_is_marked(tmp_path: Path) -> None:
    with Spool.create(tmp_path, LIMITS) as new:
        new.commit({"id": "a"})
    assert not spool.has_ended(tmp_path, "a")
    spool.mark_ended(tmp_path, "a")
    assert spool.has_ended(tmp_path, "a")
    spool.mark_ended(tmp_path, "gone")  # is no error


def test_the_digest_is_of_names_and_bytes(tmp_path: Path) -> None:
    digests = []
    for images in [(b"ab", b"c"), (b"ab", b"c"), (b"a", b"bc"), (b"ab",)]:
        with Spool.create(tmp_path, LIMITS) as new:
            add(new, *images)
            digests.append(new.digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("images", "type_name"),
    [
        ([b""] * 4, "TooManyImages"),
        ([b"12345678901"], "RequestTooLarge"),
        ([b"123456789"] * 3, "RequestTooLarge"),
    ],
)
def test_limits(tmp_path: Path, images: list[bytes], type_name: str) -> None:
    with Spool.create(tmp_path, LIMITS) as new, pytest.raises(Refused) as error:
        add(new, *images)
    assert (error.value.status, error.value.type) == (413, type_name)


def test_a_name_that_is_no_unicode_is_made_some(tmp_path: Path) -> None:
    with Spool.create(tmp_path, LIMITS) as new:
        new.begin("\udcff.jpg")
        new.end()
        new.commit({"id": "a"})
    assert spool.read_index(tmp_path, "a")[0].name == "?.jpg"
